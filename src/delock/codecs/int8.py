"""Whole numbers of eight bits with a scale per channel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from delock.codecs.base import Memoryless, Payload, channel_axis, dtype_name, dtype_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STEPS = 127  # int8 without -128, so that it is symmetric


@dataclass(frozen=True)
class INT8(Memoryless):
    """Whole numbers -127 .. 127 with a scale per channel: a quarter of float32. Error: at most half a scale, max |x| / 254."""

    name: ClassVar[str] = "int8"

    def takes(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Takes tensors that have channels, where a byte per number and the scales are fewer bytes than the tensor has."""
        fits = super().takes(shape, dtype) and len(shape) > 1
        return fits and self.encoded_bytes(shape)[0] < prod(shape) * dtype.itemsize

    def encoded_bytes(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """Counts a byte per number, and four per channel."""
        return prod(shape) + 4 * shape[channel_axis(shape)], 0.0

    def encode(self, x: Tensor, learn: bool) -> Payload | None:
        """Returns q = round(x / s), halves to even, and the scales s = max |x| / 127 as float32; a channel of zeros has s = 0."""
        import torch

        axis = channel_axis(x.shape)
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.abs().amax([i for i in range(x.dim()) if i != axis]) / STEPS).float()  # (C,)
        if not (scale * STEPS).isfinite().all():
            return None
        safe = torch.where(scale == 0, 1.0, scale)
        q = (wide / _along(safe, wide, axis)).round_().clamp_(-STEPS, STEPS)
        return {"codec": self.name, "values": q.to(torch.int8), "scale": scale, "dtype": dtype_name(x)}

    @staticmethod
    def decode(payload: Payload) -> Tensor:
        """Returns s q in the old dtype."""
        import torch

        q: Tensor = payload["values"]
        wide = q.to(torch.promote_types(dtype_of(payload), torch.float32))
        return wide.mul_(_along(payload["scale"], wide, channel_axis(q.shape))).to(dtype_of(payload))

    @staticmethod
    def sizes(payload: Payload) -> tuple[int, int, int]:
        """Counts values and scales; there is no codebook."""
        values: Tensor = payload["values"]
        return values.numel() * dtype_of(payload).itemsize, values.nbytes + payload["scale"].nbytes, 0


def _along(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    """Returns a value per channel in the shape that x can be multiplied by."""
    return scale.to(x.dtype).view([-1 if i == axis else 1 for i in range(x.dim())])
