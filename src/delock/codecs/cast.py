"""The codecs without memory: bfloat16, and whole numbers of eight bits with a scale per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEPS = 127  # int8 without -128, so that it is symmetric


def encode_bf16(x: Tensor) -> dict[str, Any]:
    """x rounded to the nearest bfloat16, halves to even."""
    return {"codec": "bf16", "values": x.to(torch.bfloat16), "dtype": dtype_name(x)}


def decode_bf16(payload: dict[str, Any]) -> Tensor:
    """The rounded values in their old dtype."""
    values: Tensor = payload["values"]
    return values.to(dtype_of(payload))


def encode_int8(x: Tensor) -> dict[str, Any]:
    """q = round(x / s), halves to even, with s = max |x| / 127 of every channel as float32; a channel of zeros has s = 0."""
    axis = channel_axis(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax([i for i in range(x.dim()) if i != axis]) / STEPS).float()  # (C,)
    safe = torch.where(scale == 0, 1.0, scale)
    q = (wide / _along(safe, wide, axis)).round_().clamp_(-STEPS, STEPS)
    return {"codec": "int8", "values": q.to(torch.int8), "scale": scale, "dtype": dtype_name(x)}


def decode_int8(payload: dict[str, Any]) -> Tensor:
    """s q in the old dtype."""
    q: Tensor = payload["values"]
    wide = q.to(torch.promote_types(dtype_of(payload), torch.float32))
    return wide.mul_(_along(payload["scale"], wide, channel_axis(q))).to(dtype_of(payload))


def channel_axis(x: Tensor) -> int:
    """Where the channels are: the last of three dimensions (batch, place, channel), else the second; x has at least two."""
    return 2 if x.dim() == 3 else 1


def dtype_name(x: Tensor) -> str:
    """The dtype as a payload names it: "float32"."""
    return str(x.dtype).removeprefix("torch.")


def dtype_of(payload: dict[str, Any]) -> torch.dtype:
    """The dtype that a payload's tensor had."""
    dtype: torch.dtype = getattr(torch, payload["dtype"])
    return dtype


def _along(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    """A value per channel in the shape that x can be multiplied by."""
    return scale.to(x.dtype).view([-1 if i == axis else 1 for i in range(x.dim())])
