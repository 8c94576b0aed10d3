"""Numbers rounded to bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from delock.codecs.base import Memoryless, Payload, dtype_name, dtype_of, within

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST = float.fromhex("0x1.fep127")  # 3.39e38


@dataclass(frozen=True)
class BF16(Memoryless):
    """Rounds to the nearest bfloat16, halves to even: half the bytes of float32. Error: at most 2^-8 of a value."""

    name: ClassVar[str] = "bf16"

    def takes(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Takes numbers of more than two bytes."""
        return super().takes(shape, dtype) and dtype.itemsize > 2

    def encoded_bytes(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """Counts two bytes per number."""
        return 2 * prod(shape), 0.0

    def encode(self, x: Tensor, learn: bool) -> Payload | None:
        """Returns the rounded values."""
        if not within(x, LARGEST):
            return None
        return {"codec": self.name, "values": x.detach().bfloat16(), "dtype": dtype_name(x)}

    @staticmethod
    def decode(payload: Payload) -> Tensor:
        """Returns the rounded values in their old dtype."""
        values: Tensor = payload["values"]
        return values.to(dtype_of(payload))

    @staticmethod
    def sizes(payload: Payload) -> tuple[int, int, int]:
        """Counts the values; there is no codebook."""
        values: Tensor = payload["values"]
        return values.numel() * dtype_of(payload).itemsize, values.nbytes, 0
