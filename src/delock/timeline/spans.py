"""Defines Span, an op on the clock, and Timeline; predicted and measured timelines are of this one type."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Timeline:
    """Holds the spans of every stage: columns[k] those of stage k, in order of time."""

    columns: tuple[tuple[Span, ...], ...]

    @property
    def K(self) -> int:
        """Returns the number of stages."""
        return len(self.columns)

    @property
    def begin(self) -> float:
        """Returns the second at which the first op starts, or 0 if there is none."""
        return min((column[0].start for column in self.columns if column), default=0.0)

    @property
    def end(self) -> float:
        """Returns the second at which the last op ends, or 0 if there is none."""
        return max((column[-1].end for column in self.columns if column), default=0.0)
