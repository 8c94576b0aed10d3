"""Product quantization: a vector of channels travels as the index of the nearest one in a codebook that both ends have."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from delock.codecs.base import Codec, Encoder, Payload, channel_axis, dtype_of
from delock.codecs.bits import bits_for, packed_bytes
from delock.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST = 65536  # codes: an index then takes two bytes


@dataclass(frozen=True)
class VQ(Codec):
    """Product quantization: the channels in groups of `dim`, each group with a codebook of `codes` vectors that learns as it goes.

    `groups` may be given in place of `dim`. `every`: batches between two codebooks sent. The codebooks learn what activations look
    like, so errors are not encoded with them.
    """

    codes: int = 256
    dim: int = 16
    groups: int | None = None
    every: int = 50
    name: ClassVar[str] = "vq"
    takes_errors: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 2 <= self.codes <= LARGEST:
            raise UsageError(f"a codebook of {self.codes} codes is out of range: vq takes codes=2 to codes={LARGEST}")
        for name, value in (("dim", self.dim), ("groups", self.groups), ("every", self.every)):
            if value is not None and value < 1:
                raise UsageError(f"vq's {name} is {value}, but it must be at least 1")
        if self.groups is not None and self.dim != VQ.dim:
            raise UsageError(f"vq is given dim={self.dim} and groups={self.groups}, which say the same thing: give one of them")

    def takes(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Takes numbers of more than one byte in tensors that have channels."""
        return super().takes(shape, dtype) and len(shape) > 1 and dtype.itemsize > 1

    def encoded_bytes(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """Counts an index per vector, in whole bytes, and a codebook every `every` batches."""
        channels = shape[channel_axis(shape)]
        indices = prod(shape) // self.group_size(channels)
        return packed_bytes(indices, bits_for(self.codes)), 4 * self.codes * channels / self.every

    def group_size(self, channels: int) -> int:
        """Returns d, the channels in a group. Raises UsageError where the groups are not of equal size."""
        if self.groups is None and channels % self.dim == 0:
            return self.dim
        if self.groups is not None and channels % self.groups == 0:
            return channels // self.groups
        asked = f"{self.groups} groups" if self.groups is not None else f"groups of {self.dim}"
        sizes = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
        raise UsageError(f"vq cannot divide {channels} channels into {asked}: give dim=N (or groups=N) with one of {sizes}")

    def encoder(self, seed: int) -> Encoder:
        """Returns an encoder with codebooks still to be learned; `seed` is that of their draws."""
        from delock.codecs.quantize import VQEncoder

        return VQEncoder(self.codes, self.every, self.group_size, seed)

    @staticmethod
    def decode(payload: Payload) -> Tensor:
        """Returns the vectors that the indices stand for."""
        from delock.codecs.quantize import decode_vq

        return decode_vq(payload)

    @staticmethod
    def sizes(payload: Payload) -> tuple[int, int, int]:
        """Counts indices, and the codebook where it is sent along."""
        codes: Tensor = payload["codes"]
        return prod(payload["shape"]) * dtype_of(payload).itemsize, codes.nbytes, payload["book"].nbytes if payload["fresh"] else 0
