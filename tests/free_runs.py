"""Listens to free runs, with what their visits must be however often a run went on from a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from delock.methods import AsyncDGL
from delock.records import CheckpointRecord, Event, Resumed, StageReport, Visit, VisitsRecord

Turns = Sequence[Sequence[Visit]]


class Listener:
    """Keeps the visits that count, as a trace does, and the checkpoints; `then` hears every event, too."""

    def __init__(self, K: int, then: Callable[[Event], None] = lambda event: None) -> None:
        self.turns: list[list[Visit]] = [[] for _ in range(K)]
        self.written: list[CheckpointRecord] = []
        self.resumed: list[Resumed] = []
        self.then = then

    def __call__(self, event: Event) -> None:
        match event:
            case VisitsRecord(stage, visits):
                self.turns[stage] += visits
            case CheckpointRecord():
                assert not event.problem, event.problem
                self.written.append(event)
            case Resumed(cuts=cuts):
                self.resumed.append(event)
                self.turns = [[v for v in stage if k < len(cuts) and cuts[k].keeps(v)] for k, stage in enumerate(self.turns)]
        self.then(event)


def assert_in_order(turns: Turns, method: AsyncDGL, updates: int, evaluations: int) -> None:
    """Own numbers without a gap; what is read was sent before, stood in the buffer, and was not read too often."""
    for k, stage in enumerate(turns):
        visits = [turn for turn in stage if not turn.evaluates]
        assert [turn.ordinal for turn in visits] == list(range(len(visits)))
        assert [turn.ordinal for turn in stage if turn.evaluates] == list(range(evaluations))
        assert [turn.trains for turn in visits] == [i < updates for i in range(len(visits))]
        assert [turn.version for turn in visits] == [min(i, updates) for i in range(len(visits))]
        assert all(a.end <= b.start for a, b in itertools.pairwise(stage))
        if k == 0:
            assert [turn.source for turn in visits] == list(range(len(visits)))
            continue
        sent = {turn.ordinal: (i, turn.start) for i, turn in enumerate(t for t in turns[k - 1] if t.sent and not t.evaluates)}
        newest = 0
        for turn in visits:
            place, start = sent[turn.source]
            assert start < turn.start
            newest = max(newest, place)
            assert place > newest - method.buffer, "it had been overwritten"
        reads = [turn.source for turn in visits]
        assert not method.max_reuse or max(map(reads.count, reads)) <= method.max_reuse


def assert_counted(reports: Sequence[StageReport], turns: Turns) -> None:
    """The reports on buffers fit the turns."""
    for k, (report, stage) in enumerate(zip(reports, turns, strict=True)):
        visits = [turn for turn in stage if not turn.evaluates]
        reads = len(visits) if k else 0
        assert sum(n * count for n, count in report.reuse.items()) == reads
        assert sum(report.visits_behind.values()) == sum(report.versions_behind.values()) == reads
        if k:
            sent = sum(turn.sent and not turn.evaluates for turn in turns[k - 1])
            assert sum(report.reuse.values()) == sent
        assert report.staleness == {0: sum(turn.trains for turn in visits)}
