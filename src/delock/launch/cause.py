"""Finds the rank that caused the failure of another one, among torchrun's ranks, which have no parent to ask."""

from __future__ import annotations

import time

from delock.launch.failure import Failure, hung_up
from delock.launch.heartbeats import BEAT, Heartbeats
from delock.launch.progress import Position
from delock.launch.roll import Verdict

_SEARCH = 4.0  # seconds in which an echo looks for its cause
_SILENT = 6 * BEAT  # seconds without a heartbeat of a rank that may be the cause
_POLL = 0.05


def cause(failure: Failure, error: BaseException, at: Position, watch: Heartbeats) -> Verdict:
    """Returns the verdict on the run after a failure on this rank; it is this rank's own, unless another rank was first or has died."""
    own = str(failure).partition("\n")[0]
    try:
        if not failure.echo:
            return watch.roll.claim(failure.rank, own)
        deadline = time.monotonic() + _SEARCH
        closed = at.waits_for if hung_up(error) else None
        while time.monotonic() < deadline:
            if found := _found(closed, watch):
                return found
            time.sleep(_POLL)
        return watch.roll.claim(failure.rank, own)
    except RuntimeError:
        gone = f"{watch.name} is gone, too"
        where = f"it stops {at}"
        if at.waits_for is None:
            return Verdict(failure.rank, failure.rank, f"{own}; {gone}")
        return Verdict(at.waits_for, failure.rank, f"stage {failure.rank} has lost stage {at.waits_for}, and {gone}; {where}")


def _found(closed: int | None, watch: Heartbeats) -> Verdict | None:
    """Returns the verdict that was announced, or announces a rank that has died; `closed`: the peer that has closed its connection."""
    if told := watch.roll.failed() or watch.roll.bury(watch.place):
        return told
    if closed is not None and not watch.roll.left(closed):  # a rank that ends in order says so before
        return watch.roll.claim(closed, f"stage {closed} has died {watch.place(closed)}: its connections are closed")
    silent = next((rank for rank in watch.ranks if watch.silent_for(rank) >= _SILENT and not watch.roll.left(rank)), None)
    if silent is None:
        return None
    return watch.roll.claim(silent, f"stage {silent} has died {watch.place(silent)}: it gives no sign of life")
