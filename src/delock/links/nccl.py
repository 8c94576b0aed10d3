"""Tensors that stay on their device while they travel: a process group per link and direction, NCCL for GPUs.

NCCL knows no tags, it pairs the n-th send with the n-th receive of a communicator. Within one direction of one link both ends follow
the plan's order, so a communicator each is enough, and no direction can hold up another:

    link k   up    k -> k + 1    activations      its own group
             down  k + 1 -> k    errors           its own group
"""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Courier:
    """Sends and fetches whole tensors for rank k; all ranks build theirs at the same time.

    `depth`: messages under way to a peer before the sender waits.
    """

    def __init__(self, depth: dict[int, int], device: torch.device, backend: str | None = None) -> None:
        self.depth = depth
        k, world = dist.get_rank(), dist.get_world_size()
        self.ways: dict[tuple[int, int], Any] = {}  # (from, to) -> group
        for link in range(world - 1):  # every rank makes every group, in one order: new_group asks for it
            for way in ((link, link + 1), (link + 1, link)):
                self.ways[way] = dist.new_group([link, link + 1], backend=backend)
        self.pending: dict[int, deque[list[tuple[Any, Tensor]]]] = {peer: deque() for peer in depth}  # a list per message
        for source, to in self.ways:  # meet once: a communicator's first use waits for the other end
            if source == k:
                self.send(to, [torch.zeros(1, device=device)])
            elif to == k:
                self.fetch(source, [torch.zeros(1, device=device)])

    def takes(self, leaf: Tensor) -> bool:
        """Says whether a tensor travels this way: those on a GPU do."""
        return leaf.device.type == "cuda" and leaf.numel() > 0

    def send(self, to: int, lines: list[Tensor]) -> float:
        """Starts sending the tensors of a message, which must not be written to afterwards; returns the seconds that it waited before."""
        pending, group = self.pending[to], self.ways[dist.get_rank(), to]
        asked = perf_counter()
        while len(pending) >= self.depth[to]:
            _arrive(pending.popleft())
        waited = perf_counter() - asked
        pending.append([(dist.isend(line, to, group=group), line) for line in lines])
        return waited

    def fetch(self, source: int, lines: list[Tensor]) -> None:
        """Receives into tensors; on a GPU the current stream waits, not the program."""
        group = self.ways[source, dist.get_rank()]
        works: list[Any] = [dist.irecv(line, source, group=group) for line in lines]
        for work in works:
            work.wait()

    def close(self) -> None:
        """Lets everything arrive."""
        for pending in self.pending.values():
            while pending:
                _arrive(pending.popleft())


def _arrive(message: list[tuple[Any, Tensor]]) -> None:
    for work, _ in message:
        work.wait()
