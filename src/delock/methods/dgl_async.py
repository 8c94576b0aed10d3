"""Defines asynchronous DGL: stages learn from a replay buffer and do not wait for each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from delock.errors import UsageError
from delock.methods.base import MOST, at_least, one_of, whole
from delock.methods.dgl import DGL

MOST_SLOW = 10_000  # times as long as the others: the run waits for its slowest stage


@dataclass(frozen=True)
class AsyncDGL(DGL):
    """Puts a replay buffer in front of every stage of DGL but the first; the stage below fills it at its own pace.

        stage 0 |F0.0 B0.0 F1.1 B1.1 F2.2 B2.2     the order of equally fast stages and of order="round-robin", which equals dgl.
        stage 1 |     F0.0 B0.0 F1.1 B1.1 F2.2     Otherwise stage k's n-th Forward reads from its buffer any batch of the stage
        stage 2 |          F0.0 B0.0 F1.1 B1.1     below, perhaps one that it has read before

    Source: Belilovsky, Eickenberg, Oyallon, ICML 2020; arXiv 2106.06401. Update: that of DGL on the batch that the stage reads: the
    least used in its buffer, and the newest of several. A stage that is done goes on forwarding, in eval mode, until all are done.

    symbol in the paper | here
    M (size of B_j)     | buffer, in mini-batches
    S = 1 / (1 - noise) | noise, of the stage slow_stage: it takes S times as long as the others
    -                   | max_reuse: times that a batch may be read, 0 for any number of times

    order: "free" runs every stage in a process at its own pace, and records the run as a plan; a slowed stage waits after each op, S - 1
    times as long as the op took. "sampled" runs all stages in one process and draws the next to act, all with equal probability, a slowed
    one with 1 - noise against 1. "round-robin" runs one stage after the other in one process.
    Deviations: a put is not counted as a use, and ties go to the newest, as in the text (the released code differs). If two messages are
    under way on a link, a batch is left out. Staleness of the gradient: 0. An input is at most buffer - 1 puts older than the newest.
    Memory of stage k: one graph, its head, `buffer` inputs.
    """

    name: ClassVar[str] = "dgl-async"
    planned: ClassVar[bool] = False
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({"turns": "order"})
    buffer: int = 5
    max_reuse: int = 0
    order: Literal["free", "sampled", "round-robin"] = "free"
    slow_stage: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        whole("buffer", self.buffer, 1)
        whole("max_reuse", self.max_reuse, 0, MOST)
        whole("slow_stage", self.slow_stage, 0)
        one_of("order", self.order, ("free", "sampled", "round-robin"))
        at_least("noise", self.noise, 0)
        if not self.noise < 1:
            raise UsageError(f"noise is {self.noise}, but it must lie in [0, 1): a stage is slowed by S = 1 / (1 - noise)")
        at_least("S = 1 / (1 - noise)", 1 / (1 - self.noise), 1, MOST_SLOW)

    @property
    def free_running(self) -> bool:
        return self.order == "free"

    def slowdown(self, k: int) -> float:
        return 1 / (1 - self.noise) if k == self.slow_stage else 1.0

    def fits(self, K: int) -> None:
        if self.slow_stage >= K:
            raise UsageError(f"slow_stage is {self.slow_stage}, but the stages are 0 .. {K - 1}")

    def fits_workers(self, workers: str) -> None:
        if self.free_running and workers == "inline":
            raise UsageError("free-running stages need a process each: use workers processes, or order sampled or round-robin")
        if not self.free_running and workers != "inline":
            raise UsageError(f"{self.order} turns are taken in one process: use workers inline, or order free")
