"""Gathers bytes from all ranks of the default process group. What comes is read as data: nothing of it can run code."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather(own: bytes) -> list[bytes]:
    """Returns what every rank gave, in rank order, on every rank; all call it together."""
    world = dist.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(own)]))
    longest = max(int(length) for length in lengths)
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world)]
    row = torch.zeros(longest, dtype=torch.uint8)
    row[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else row[:0]
    dist.all_gather(rows, row)
    return [one[: int(length)].numpy().tobytes() for one, length in zip(rows, lengths, strict=True)]
