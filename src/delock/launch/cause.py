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
    """Returns the verdict on the run after a failure on this rank; it is this rank's own, unless another was first, died or left."""
    try:
        if failure.echo and (found := _search(at.waits_for if hung_up(error) else None, watch)):
            return found
        if failure.echo and (gone := [rank for rank in watch.ranks if rank != failure.rank and watch.roll.left(rank)]):
            return watch.roll.claim(gone[0], f"stage {gone[0]} has left the run: it was told to end, or its program says why")
        return watch.roll.claim(failure.rank, failure.headline)
    except RuntimeError:
        return _without_store(failure, at, watch)


def _search(closed: int | None, watch: Heartbeats) -> Verdict | None:
    deadline = time.monotonic() + _SEARCH
    while time.monotonic() < deadline:
        if found := _found(closed, watch):
            return found
        time.sleep(_POLL)
    return None


def _without_store(failure: Failure, at: Position, watch: Heartbeats) -> Verdict:
    """Returns a verdict that no other rank can read."""
    if watch.verdict or not failure.echo:
        return watch.verdict or Verdict(failure.rank, failure.rank, failure.headline)
    lost = watch.name if at.waits_for is None else f"stage {at.waits_for}, and {watch.name}"
    culprit = failure.rank if at.waits_for is None else at.waits_for
    return Verdict(culprit, failure.rank, f"stage {failure.rank} stops {at}, because it has lost {lost}")


def _found(closed: int | None, watch: Heartbeats) -> Verdict | None:
    """Returns the verdict that was announced, or announces a rank that has died; `closed`: the peer that has closed its connection."""
    if told := watch.roll.failed() or watch.bury():
        return told
    silent = [rank for rank in watch.ranks if watch.silent_for(rank) >= _SILENT]
    signs = [(rank, "its connections are closed") for rank in [closed] if rank is not None]
    signs += [(rank, "it gives no sign of life") for rank in silent]
    # a rank that ends in order says so before
    return next((watch.roll.bury(rank, sign, watch.place(rank)) for rank, sign in signs if not watch.roll.left(rank)), None)
