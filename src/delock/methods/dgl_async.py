"""Asynchronous DGL: stages that learn from a replay buffer and wait for nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from delock.errors import UsageError
from delock.methods.base import at_least, one_of
from delock.methods.dgl import DGL


@dataclass(frozen=True)
class AsyncDGL(DGL):
    """DGL with a replay buffer in front of every stage but the first, filled by the stage below at that stage's own pace.

        stage 0 |F0.0 B0.0 F1.1 B1.1 F2.2 B2.2     the order if all stages are equally fast, and that of order="round-robin", which
        stage 1 |     F0.0 B0.0 F1.1 B1.1 F2.2     equals dgl; otherwise stage k's n-th Forward reads what the buffer holds: any
        stage 2 |          F0.0 B0.0 F1.1 B1.1     batch of the stage below, perhaps one it has read before

    Source: Belilovsky, Eickenberg, Oyallon, ICML 2020; arXiv 2106.06401. Update: that of DGL on the batch read: the least used in the
    buffer, the newest of these. A stage that has made its updates goes on forwarding, in eval mode, until all have.

    symbol in the paper | here
    M (size of B_j)     | buffer, in mini-batches
    S = 1 / (1 - noise) | noise, of the stage slow_stage: how much slower it is than the others
    -                   | max_reuse: times that a batch may be read, 0 for any number of times

    order: "free", a process per stage at its own pace (a slowed stage waits after each op, S - 1 times as long as that took; what
    happened is recorded as a plan); "sampled", one process, the next stage to act drawn with equal probability, 1 - noise against 1 for
    the slowed one; "round-robin", one process, stage after stage.
    Deviations: a put is not counted as a use, and ties go to the newest, as in the text (the released code differs). On a link with two
    messages under way a batch is left out rather than waited for. Staleness of the gradient: 0. An input is older than the newest put
    by at most buffer - 1 puts. Memory of stage k: one graph, its head, `buffer` inputs.
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
        at_least("buffer", self.buffer, 1)
        at_least("max_reuse", self.max_reuse, 0)
        at_least("slow_stage", self.slow_stage, 0)
        one_of("order", self.order, ("free", "sampled", "round-robin"))
        if not 0 <= self.noise < 1:
            raise UsageError(f"noise is {self.noise}, but it must lie in [0, 1): a stage is slowed by S = 1 / (1 - noise)")

    @property
    def free_running(self) -> bool:
        return self.order == "free"

    def slowdown(self, k: int) -> float:
        return 1 / (1 - self.noise) if k == self.slow_stage else 1.0

    def fits(self, K: int) -> None:
        if self.slow_stage >= K:
            raise UsageError(f"slow_stage is {self.slow_stage}, but the stages are 0 .. {K - 1}")
