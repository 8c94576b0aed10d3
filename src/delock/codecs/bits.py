"""Indices in as few bits as they need: value i takes bits i w .. (i + 1) w - 1 of the row of bytes, the lowest bit first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def bits_for(codes: int) -> int:
    """Returns the bits of an index of 0 .. codes - 1."""
    return (codes - 1).bit_length()


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Returns whole numbers (n,) of 0 .. 2^width - 1, width 1 .. 16, as uint8 (ceil(n width / 8),); what is left of the last byte is 0."""
    import torch

    if width == 8:
        return values.to(torch.uint8)
    count = len(values)
    rows = torch.nn.functional.pad(values.to(torch.int32), (0, -count % 8)).view(-1, 8)  # eight values fill `width` bytes
    packed = torch.zeros(len(rows), width, dtype=torch.int32, device=values.device)
    for i, byte, shift in _overlaps(width):
        packed[:, byte] |= rows[:, i] << shift if shift >= 0 else rows[:, i] >> -shift
    return packed.bitwise_and_(255).to(torch.uint8).view(-1)[: packed_bytes(count, width)]


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """Returns the first `count` values of a row that `pack_bits` made, as int32 (count,)."""
    import torch

    if width == 8:
        return packed[:count].to(torch.int32)
    groups = -(-count // 8)
    filled = torch.nn.functional.pad(packed, (0, groups * width - len(packed))).view(groups, width).to(torch.int32)
    values = torch.zeros(groups, 8, dtype=torch.int32, device=packed.device)
    for i, byte, shift in _overlaps(width):
        values[:, i] |= filled[:, byte] >> shift if shift >= 0 else filled[:, byte] << -shift
    return values.bitwise_and_((1 << width) - 1).view(-1)[:count]


def packed_bytes(count: int, width: int) -> int:
    """Returns the bytes that `count` values take."""
    return -(-count * width // 8)


def _overlaps(width: int) -> list[tuple[int, int, int]]:
    """Returns, for eight values, (value, a byte it has bits in, how far the value is to be shifted left to lie in that byte)."""
    spans = [(i, i * width, (i + 1) * width - 1) for i in range(8)]
    return [(i, byte, first - 8 * byte) for i, first, last in spans for byte in range(first // 8, last // 8 + 1)]
