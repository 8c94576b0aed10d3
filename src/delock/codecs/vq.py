"""Vector quantization of one stream of activations: indices travel, and every now and then the codebook that they are of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from delock.codecs.bits import pack_bits, unpack_bits
from delock.codecs.cast import channel_axis, dtype_name, dtype_of
from delock.codecs.codebook import Codebooks, nearest
from delock.codecs.names import VQ
from delock.errors import UsageError


class VQEncoder:
    """Encodes with the codebook last sent, while the next one is learned. `seed` is that of the codebooks' draws."""

    def __init__(self, codec: VQ, seed: int) -> None:
        self.codec, self.books = codec, Codebooks(codec.codes, seed)
        self.version = 0  # of the codebook last sent
        self.book = torch.zeros(0)  # that codebook, (N, K, d) float32; never written to
        self.resend = False  # whether it has to go out again: the receiver may be another one

    def encode(self, x: Tensor, learn: bool) -> dict[str, Any] | None:
        """The payload of x, with at least two dimensions; None where nothing has been learned yet, and x is not to be learned from.

        Indices are those of every place, group after group. Raises UsageError for another number of channels than before.
        """
        if not learn and not self.version:
            return None
        axis = channel_axis(x)
        channels = x.shape[axis]
        d = self.codec.length(channels)
        if self.version and channels != self.book.shape[0] * self.book.shape[2]:
            raise UsageError(f"vq has learned {self.book.shape[0] * self.book.shape[2]} channels, and this activation has {channels}")
        vectors = x.detach().movedim(axis, -1).reshape(-1, channels).float()  # (M, C)
        due = learn and self.books.steps % self.codec.every == 0
        if learn:
            self.books.learn(vectors, d)
        if due:
            self.version, self.book = self.version + 1, self.books.vectors.contiguous()
        fresh, self.resend = due or self.resend, False
        indices = torch.stack([nearest(part, book) for part, book in zip(torch.split(vectors, d, 1), self.book, strict=True)], 1)  # (M, N)
        return {
            "codec": "vq",
            "codes": pack_bits(indices.view(-1), self.codec.bits),
            "shape": list(x.shape),
            "stride": list(torch.empty_like(x, device="meta").stride()),  # dense, in the order of x
            "dtype": dtype_name(x),
            "version": self.version,
            "book": self.book,
            "fresh": fresh,
        }

    def state(self) -> dict[str, Any]:
        """All there is, as values that can be saved."""
        return {"books": self.books.state(), "version": self.version, "book": self.book}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`: the next payload brings its codebook."""
        self.books.load(state["books"])
        self.version, self.book, self.resend = state["version"], state["book"], True


def decode_vq(payload: dict[str, Any]) -> Tensor:
    """The vectors that the indices stand for, in the old shape, layout and dtype."""
    shape: list[int] = payload["shape"]
    book: Tensor = payload["book"]
    groups, codes, d = book.shape
    x = torch.empty_strided(shape, payload["stride"], dtype=dtype_of(payload), device=book.device)
    axis = channel_axis(x)
    count = x.numel() // d
    indices = unpack_bits(payload["codes"], (codes - 1).bit_length(), count).view(-1, groups)
    if groups > 1:
        indices = indices + torch.arange(0, groups * codes, codes, dtype=indices.dtype, device=indices.device)
    vectors = torch.nn.functional.embedding(indices, book.reshape(-1, d))  # (M, N, d)
    x.movedim(axis, -1).copy_(vectors.view(x.movedim(axis, -1).shape))
    return x
