"""Counts messages under way between two stages at the beginning of a tick: a checkpoint records them as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from delock.ops import Backward, Evaluate, Forward
from delock.plan import Step, needs_error


def under_way(columns: Sequence[Sequence[Step]], k: int) -> tuple[int, int]:
    """Returns the largest numbers of messages under way to stage k: activations from below, errors from above."""
    below, above = (columns[i] if 0 <= i < len(columns) else () for i in (k - 1, k + 1))
    taken = [step.tick for step in columns[k] if isinstance(step.op, Forward | Evaluate) and k > 0]
    learned = [step.tick for step in columns[k] if isinstance(step.op, Backward) and needs_error(k, step.op)]
    return _most((step.tick for step in below if step.up), taken), _most((step.tick for step in above if step.down), learned)


def _most(sent: Iterable[int], came: Iterable[int]) -> int:
    """Returns the most that is sent and has not come at the end of any tick, from the ticks of both."""
    change = Counter(sent)
    change.subtract(came)
    return max(accumulate(change[tick] for tick in sorted(change)), default=0)
