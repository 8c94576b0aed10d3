"""Defines Span, an op on the clock, and Timeline; predicted and measured timelines are of this one type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from delock.ops import Op


@dataclass(frozen=True, slots=True)
class Span:
    """Holds one op of one stage and its seconds; end - start is work alone.

    If a Backward recomputes while its error is still under way, and then waits for it, that wait is counted before its start, in `waited`.
    """

    stage: int
    op: Op
    start: float  # seconds, on one clock for all stages
    end: float
    version: int  # Updates that the stage had made before the op
    tick: int
    waited: float  # seconds of waiting before start: for a message, for room in a link, at a barrier
    full: float = 0.0  # seconds of `waited` in which a link was full
    copied: float = 0.0  # seconds of end - start in which messages were laid out, encoded and decoded
    slot: int = 0  # as in the Step


@dataclass(frozen=True, slots=True)
class Times:
    """Holds the numbers from which speed is measured: per stage its ops in order of time, and the seconds at which each starts and ends."""

    ops: list[list[Op]]
    starts: list[list[float]]
    ends: list[list[float]]

    @property
    def times(self) -> Times:
        """Returns itself, as a Timeline returns its times."""
        return self

    @property
    def K(self) -> int:
        """Returns the number of stages."""
        return len(self.ops)

    @property
    def begin(self) -> float:
        """Returns the second at which the first op starts, or 0 if there is none."""
        return min((starts[0] for starts in self.starts if starts), default=0.0)

    @property
    def end(self) -> float:
        """Returns the second at which the last op ends, or 0 if there is none."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    def column(self, k: int) -> Iterator[tuple[Op, float, float]]:
        """Yields (op, start, end) for every op of stage k."""
        return zip(self.ops[k], self.starts[k], self.ends[k], strict=True)


@dataclass(frozen=True, slots=True)
class Timeline:
    """Holds the spans of every stage: columns[k] those of stage k, in order of time."""

    columns: tuple[tuple[Span, ...], ...]

    @property
    def K(self) -> int:
        """Returns the number of stages."""
        return len(self.columns)

    @property
    def times(self) -> Times:
        """Returns only the ops and seconds of the spans."""
        return Times(
            [[span.op for span in column] for column in self.columns],
            [[span.start for span in column] for column in self.columns],
            [[span.end for span in column] for column in self.columns],
        )

    @property
    def begin(self) -> float:
        """Returns the second at which the first op starts, or 0 if there is none."""
        return self.times.begin

    @property
    def end(self) -> float:
        """Returns the second at which the last op ends, or 0 if there is none."""
        return self.times.end


class Timed(Protocol):
    """A Timeline, or the Times of one."""

    @property
    def times(self) -> Times: ...
