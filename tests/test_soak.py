"""A long run with many checkpoints takes no more memory, handles, threads or shared memory at its end than near its beginning."""

from __future__ import annotations

import multiprocessing
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import delock
from delock.checkpoints.directory import newest_first
from delock.records import CheckpointRecord, Event, StepRecord

from survivors import SGD, data, network

UPDATES, EVERY, EARLY = 20_000, 500, 1_000
SPAN = 100  # updates over which the least is taken: a thread that writes comes and goes
MORE, LOSS = 512 << 10, 120  # bytes: of what an allocator keeps, and of a batch's loss and count in lists


class Census:
    """Counts what the stages' processes and this one hold, on the way; to be given to `fit` as a callback."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str, str], int] = defaultdict(lambda: 1 << 60)  # (updates, process, what) -> least
        self.checkpoints: list[CheckpointRecord] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, CheckpointRecord):
            self.checkpoints.append(event)
        if isinstance(event, StepRecord):
            for end in (EARLY, UPDATES):
                if end - SPAN < event.batches <= end:
                    self.count(end)

    def count(self, when: int) -> None:
        """Counts now."""
        stages = {one.name: one.pid for one in multiprocessing.active_children() if one.name.startswith("delock-stage-")}
        for name, pid in {**stages, "parent": os.getpid()}.items():
            for what, number in held(pid or 0).items():
                place = when, name, what
                self.found[place] = min(self.found[place], number)


def held(pid: int) -> dict[str, int]:
    """Resident bytes of a process, shared ones of these, its threads and open handles, and its mappings of memory that is shared."""
    place = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    shared = [line for line in (place / "maps").read_text().splitlines() if line.split()[1].endswith("s")]
    size = {name: int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem")}
    return {**size, "Threads": int(status["Threads"]), "handles": len(list((place / "fd").iterdir())), "shared mappings": len(shared)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts what processes hold in /proc, as Linux has it")
@pytest.mark.usefixtures("own_random")
def test_checkpoints_leave_nothing_behind(tmp_path: Path) -> None:
    census = Census()
    delock.fit(
        network(64), data(EVERY), None, loss=torch.nn.functional.cross_entropy, optimizer=SGD, method=delock.FDG(micro_batches=2),
        cuts=[2, 4, 5], batches=UPDATES, report=delock.Report(log_every=10), callbacks=[census],
        checkpoint=delock.Checkpoint(tmp_path, every=EVERY),
    )  # fmt: skip
    assert [one.problem for one in census.checkpoints] == [""] * (UPDATES // EVERY - 1)
    assert len(newest_first(tmp_path)) == 2
    assert len(list(tmp_path.iterdir())) == 2
    early, late = ({(name, what): n for (when, name, what), n in census.found.items() if when == end} for end in (EARLY, UPDATES))
    assert early.keys() == late.keys()
    assert len(early) == 5 * 5
    grown = {place: late[place] - early[place] for place in early}
    for (name, what), more in grown.items():
        losses = LOSS * (UPDATES - EARLY) if name == "delock-stage-3" else 0
        assert more <= (MORE + losses if what.startswith("Rss") else 0), f"{name}: {what} has grown by {more}"
