"""An op on the clock: predicted and measured timelines are the same type."""

from __future__ import annotations

from dataclasses import dataclass

from delock.ops import Op


@dataclass(frozen=True, slots=True)
class Span:
    """One op of one stage, with the seconds at which it worked; end - start is work alone.

    A Backward that recomputes while its error is still under way has that wait moved in front of it, into `waited`.
    """

    stage: int
    op: Op
    start: float  # seconds, on one clock for all stages
    end: float
    version: int  # Updates that the stage had made before it
    tick: int
    waited: float  # seconds before start in which nothing had arrived, a link was full or a barrier closed
    full: float = 0.0  # of these, those in which a link was full
    copied: float = 0.0  # of end - start, seconds in which messages were laid out, encoded and decoded


@dataclass(frozen=True, slots=True)
class Timeline:
    """columns[k] holds the spans of stage k in order of time."""

    columns: tuple[tuple[Span, ...], ...]

    @property
    def K(self) -> int:
        """Number of stages."""
        return len(self.columns)

    @property
    def begin(self) -> float:
        """Second at which the first op starts, 0 when there is none."""
        return min((column[0].start for column in self.columns if column), default=0.0)

    @property
    def end(self) -> float:
        """Second at which the last op ends, 0 when there is none."""
        return max((column[-1].end for column in self.columns if column), default=0.0)
