"""Defines Method: a pure function from (tick, stage, number of stages) to ops, and the few facts that a plan needs besides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from numbers import Real
from types import MappingProxyType
from typing import ClassVar, Literal, Self

from delock.errors import UsageError
from delock.ops import Op

Order = Literal["forward-first", "backward-first"]

MOST = 10**9
"""The largest number that an option may be, unless it has a limit of its own: of batches, seconds, images."""
MANY = 4096
"""The largest number of parts, ticks or batches that an option of a method may be; a plan grows with it."""


class Method(ABC):
    """Trains one network cut into K stages, k = 0 .. K-1, by stating the ops of each stage at each tick.

    A concrete method is a frozen dataclass whose fields are the options of its paper. It need not care about the ends of a run: the plan
    leaves out batches below 0 and beyond the last, and Updates of a stage that has nothing to apply.
    """

    name: ClassVar[str]
    """The name that selects the method on the command line."""
    synchronous: ClassVar[bool] = False
    """True if the gradients that the stages apply in an update all belong to the same weights of the whole network."""
    local_losses: ClassVar[bool] = False
    """True if stages below the last may have losses, and so auxiliary heads, of their own."""
    planned: ClassVar[bool] = True
    """True if `tick` decides the order of ops; else every stage reads from a replay buffer, in an order known only during the run."""
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Old names of options, and their names today."""
    elsewhere: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Options of other methods that one may look for here, and what to use."""

    def __new__(cls, *given: object, **options: object) -> Self:
        cls.refuse_renamed(options)
        return super().__new__(cls)

    @classmethod
    def refuse_renamed(cls, options: Iterable[str]) -> None:
        """Raises UsageError for the old name of an option, and for one that is elsewhere."""
        for old in options:
            if old in cls.renamed:
                raise UsageError(f"{cls.name} has no option {old!r} any more: it is called {cls.renamed[old]}")
            if old in cls.elsewhere:
                raise UsageError(f"{cls.name} has no option {old!r}: {cls.elsewhere[old]}")

    @property
    def micro_batches(self) -> int:
        """Returns the number of micro-batches in a batch; the batch index of an op counts micro-batches."""
        return 1

    @property
    def batches_per_update(self) -> int:
        """Returns the number of batches whose gradients one Update applies (ADL's M; 1 for other methods)."""
        return 1

    @property
    def free_running(self) -> bool:
        """True if every stage runs in a process of its own at its own pace, so that no order of ops is known before the run."""
        return False

    @property
    def mixed(self) -> bool:
        """True if derivatives are taken at="mixed": the optimizer then writes to weights under live graphs."""
        return False

    @abstractmethod
    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        """Yields the ops of stage k at tick t, in order.

        Each tick starts one new batch at stage 0, and ticks repeat: tick(t + M) is tick(t) with every batch M later, M = batches_per_update
        (micro-batches: micro_batches * M later).
        """

    @abstractmethod
    def delay(self, k: int, K: int) -> int:
        """Returns D_k: micro-batches between a micro-batch's Forward and its last Backward on stage k."""

    def offset(self, k: int, K: int) -> int:
        """Returns off_k: micro-batches between a micro-batch's Forward on stage 0 and on stage k."""
        return 0

    def slowdown(self, k: int) -> float:
        """Returns the factor by which the method slows stage k down; 1 for most methods."""
        return 1.0

    def headed(self, K: int) -> range:
        """Returns the stages below the last that have a loss, and so an auxiliary head, of their own."""
        return range(0)

    def span(self, K: int) -> int:
        """Returns the ticks between a batch's first Forward on any stage and the Update that applies the last of its gradients."""
        latest = max(self.offset(k, K) + self.delay(k, K) for k in range(K))
        return -(-latest // self.micro_batches) + self.batches_per_update - 1

    def capacity(self, k: int, K: int) -> int:
        """Returns the number of messages that the link between stages k and k + 1 must hold per direction: at least 1 + lag."""
        return 1 + max(self.offset(k + 1, K) - self.offset(k, K), self.delay(k, K) - self.delay(k + 1, K), self.micro_batches)

    def fitted(self, K: int) -> Method:
        """Returns the method with the options that depend on K, and were left open, filled in."""
        return self

    def fits(self, K: int) -> None:  # noqa: B027 - most methods fit any K
        """Raises UsageError if the options do not fit K stages."""

    def fits_workers(self, workers: str) -> None:  # noqa: B027 - most methods run anywhere
        """Raises UsageError if the options do not go with these workers: "processes", "inline" or "torchrun"."""


def in_order(order: Order, last: bool, forward: Op, backward: Iterable[Op]) -> Iterator[Op]:
    """Yields one tick of a delayed method: `F B U`, or with backward-first `B U F`, except on the last stage."""
    if order == "backward-first" and not last:
        yield from backward
        yield forward
    else:
        yield forward
        yield from backward


def at_least(what: str, value: float, least: float, most: float = MOST) -> None:
    """Raises UsageError for an option that is no number, below its least value, above its largest, or NaN."""
    _number(what, value)
    if not value >= least or value == inf:
        raise UsageError(f"{what} is {_shown(value)}, but it must be {'' if abs(value) < inf else 'finite, and '}at least {least}")
    if value > most:
        raise UsageError(f"{what} is {_shown(value)}, but it must be at most {_shown(most) if isinstance(most, float) else f'{most:,}'}")


def whole(what: str, value: int, least: int, most: int = MANY) -> None:
    """Raises UsageError for an option that is no whole number, or out of its range."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{what} is {value!r}, but it must be a whole number, at least {least}")
    at_least(what, value, least, most)


def _number(what: str, value: object) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise UsageError(f"{what} is {value!r}, but it must be a number")


def _shown(value: float) -> str:
    """Returns a number as text; Python writes no number of thousands of digits."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if abs(value) < 10**30 else "a number of more than 30 digits"


def one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UsageError for an option that is not one of its choices."""
    if value not in choices:
        raise UsageError(f"{what} is {value!r}, but it must be one of {', '.join(choices)}")


def fraction(what: str, value: float) -> None:
    """Raises UsageError for a factor that is no number, or outside (0, 1]."""
    _number(what, value)
    if not 0 < value <= 1:
        raise UsageError(f"{what} is {value}, but it must lie in (0, 1]")
