"""What a method is: a pure function from (tick, stage, number of stages) to ops, with the two facts a plan needs about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

from delock.errors import UsageError
from delock.ops import Op

Order = Literal["forward-first", "backward-first"]


class Method(ABC):
    """A training method for one network cut into K stages, k = 0 .. K-1.

    A concrete method is a frozen dataclass whose fields are the options of its paper. It says what stage k does at tick t; batches
    below 0 and beyond the end are left out by the plan, and so are Updates of a stage that has nothing to apply.
    """

    name: ClassVar[str]
    """The word that selects the method on the command line."""
    synchronous: ClassVar[bool] = False
    """Whether all stages' gradients of an update belong to the same weights of the whole network."""
    local_losses: ClassVar[bool] = False
    """Whether stages below the last may have losses, and so auxiliary heads, of their own."""

    @property
    def parts(self) -> int:
        """Micro-batches in which every batch is split; a batch index in an op then counts micro-batches."""
        return 1

    @property
    def batches_per_update(self) -> int:
        """Batches whose gradients one Update applies (M of ADL; 1 elsewhere)."""
        return 1

    @property
    def free_running(self) -> bool:
        """Whether each stage runs in a process of its own at its own pace, so that no order of ops is known before the run."""
        return False

    @abstractmethod
    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        """The ops of stage k at tick t, in order. Each tick starts one new batch at stage 0."""

    @abstractmethod
    def delay(self, k: int, K: int) -> int:
        """D_k: ticks, and so batches, between a batch's Forward and its last Backward on stage k."""

    def offset(self, k: int, K: int) -> int:
        """off_k: ticks between a batch's Forward on stage 0 and on stage k."""
        return 0

    def slowdown(self, k: int) -> float:
        """How many times as long as it needs the method itself makes stage k take."""
        return 1.0

    def headed(self, K: int) -> range:
        """The stages below the last that have a loss, and so an auxiliary head, of their own."""
        return range(0)

    def span(self, K: int) -> int:
        """Ticks between the first Forward of a batch anywhere and the Update that applies the last of its gradients."""
        return max(self.offset(k, K) + self.delay(k, K) for k in range(K)) + self.batches_per_update - 1

    def capacity(self, k: int, K: int) -> int:
        """Messages that the links between stage k and k + 1 must be able to hold, per direction: at least 1 + lag."""
        return 1 + max(self.offset(k + 1, K) - self.offset(k, K), self.delay(k, K) - self.delay(k + 1, K), self.parts)

    def fits(self, K: int) -> None:  # noqa: B027 - most methods fit any K
        """Raise UsageError when the options do not belong to K stages."""


def in_order(order: Order, last: bool, forward: Op, backward: Iterable[Op]) -> Iterator[Op]:
    """One tick of a delayed method: `F B U`, or `B U F` when backward-first (the last stage has only `F B U`)."""
    if order == "backward-first" and not last:
        yield from backward
        yield forward
    else:
        yield forward
        yield from backward


def at_least(what: str, value: float, least: float) -> None:
    """Refuse an option below its least value."""
    if value < least:
        raise UsageError(f"{what} is {value}, but it must be at least {least}")


def one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an option that is none of its choices."""
    if value not in choices:
        raise UsageError(f"{what} is {value!r}, but it must be one of {', '.join(choices)}")


def fraction(what: str, value: float) -> None:
    """Refuse a factor outside (0, 1]."""
    if not 0 < value <= 1:
        raise UsageError(f"{what} is {value}, but it must lie in (0, 1]")
