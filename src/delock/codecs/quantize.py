"""Vector quantization of one stream of activations: indices travel, and every now and then the codebook that they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from delock.codecs.base import Payload, channel_axis, dtype_name, dtype_of, within
from delock.codecs.bits import bits_for, pack_bits, unpack_bits
from delock.codecs.codebook import Codebooks, nearest
from delock.errors import UsageError

LARGEST = 1e15  # squares of larger numbers, and sums of them, might be no float32


class VQEncoder:
    """Encodes with the codebook last sent, while the next one is learned, which is sent after `every` batches.

    `group_size(channels)`: d, the channels in a group. `seed` is that of the codebooks' draws.
    """

    def __init__(self, codes: int, every: int, group_size: Callable[[int], int], seed: int) -> None:
        self.codes, self.every, self.group_size = codes, every, group_size
        self.books = Codebooks(codes, seed)
        self.version = 0  # of the codebook last sent
        self.book = torch.zeros(0)  # that codebook, (N, K, d) float32; never written to

    def encode(self, x: Tensor, learn: bool) -> Payload | None:
        """Returns the payload of x, with at least two dimensions; None where nothing is learned yet, and x teaches nothing.

        Indices are those of every place, group after group. Raises UsageError for another number of channels than before.
        """
        if not learn and not self.version:
            return None
        axis = channel_axis(x.shape)
        channels = x.shape[axis]
        d = self.group_size(channels)
        if self.version and channels != self.book.shape[0] * self.book.shape[2]:
            raise UsageError(f"vq has learned {self.book.shape[0] * self.book.shape[2]} channels, and this activation has {channels}")
        vectors = x.detach().movedim(axis, -1).reshape(-1, channels).float()  # (M, C)
        if not within(vectors, LARGEST):
            return None
        due = learn and self.books.steps % self.every == 0
        if learn:
            self.books.learn(vectors, d)
        if due:
            self.version, self.book = self.version + 1, self.books.vectors.contiguous()
        indices = torch.stack([nearest(part, book) for part, book in zip(torch.split(vectors, d, 1), self.book, strict=True)], 1)  # (M, N)
        return {
            "codec": "vq",
            "codes": pack_bits(indices.view(-1), bits_for(self.codes)),
            "shape": list(x.shape),
            "stride": list(torch.empty_like(x, device="meta").stride()),  # dense, in the order of x
            "dtype": dtype_name(x),
            "version": self.version,
            "book": self.book,
            "fresh": due,
        }

    def state(self) -> dict[str, Any]:
        """Returns all there is, as values that can be saved."""
        return {"books": self.books.state(), "version": self.version, "book": self.book}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""
        self.books.load(state["books"])
        self.version, self.book = state["version"], state["book"]


def decode_vq(payload: Payload) -> Tensor:
    """Returns the vectors that the indices stand for, in the old shape, layout and dtype."""
    shape: list[int] = payload["shape"]
    book: Tensor = payload["book"]
    groups, codes, d = book.shape
    x = torch.empty_strided(shape, payload["stride"], dtype=dtype_of(payload), device=book.device)
    axis = channel_axis(x.shape)
    count = x.numel() // d
    indices = unpack_bits(payload["codes"], bits_for(codes), count).view(-1, groups)
    if groups > 1:
        indices = indices + torch.arange(0, groups * codes, codes, dtype=indices.dtype, device=indices.device)
    vectors = torch.nn.functional.embedding(indices, book.reshape(-1, d))  # (M, N, d)
    x.movedim(axis, -1).copy_(vectors.view(x.movedim(axis, -1).shape))
    return x
