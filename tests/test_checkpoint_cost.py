"""The cost of checkpoints: what is copied and what is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zlib
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event as Flag
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from delock.checkpoints.directory import newest_first, verified
from delock.checkpoints.encoding import encode
from delock.checkpoints.files import CHUNK, save
from delock.engine.engine import run_here
from delock.errors import UsageError
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links.mailbox import Mailbox
from delock.memory.peaks import StageBytes, StageMemory
from delock.memory.under_way import under_way
from delock.methods import FDG, Method
from delock.options import Checkpoint, Placement
from delock.plan import unroll, windows
from delock.records import CheckpointRecord, Event
from delock.run.job import StageJob
from delock.run.prepare import prepare
from delock.run.request import Request
from delock.run.survival.checkpointing import Saver
from delock.run.worker import Worker
from delock.stage import Stage
from test_memory import Batches, allocated, images

from harness import every_method, jobs, one_of_each
from survivors import train

pytestmark = pytest.mark.usefixtures("own_random")

CPU = torch.device("cpu")


def test_copies_of_weights_are_not_copied_again() -> None:
    """The current weights are recorded as the copy that the next Forward takes; the optimizer writes to its state, so that is copied."""
    box = Mailbox()
    workers = [Worker(job, box.end(job.k), CPU, lambda event: None) for job in jobs("mlp", 3, FDG(), evaluate=False)]
    with torch.random.fork_rng(devices=[]):
        for plan in islice(windows(FDG(), 3, workers[0].job.length, 1), 5):
            run_here(plan, [worker.engine for worker in workers])
        engine = workers[0].engine
        seen = engine.record(5).copy["stage"]
    stage = engine.stage
    assert places(seen["module"]) >= places(stage.current())
    assert places([held["weights"] for held in seen["in_flight"].values()]) == places([held.weights for held in stage.in_flight.values()])
    assert not places(seen["module"]) & places(stage.body.weights)
    assert not places(seen["learner"]) & places(stage.learner.state())
    assert places(seen["learner"])
    assert len(seen["in_flight"]) == 4


def places(tree: Any) -> set[int]:
    """The places of the tensors of a tree in memory."""
    return {tensor.data_ptr() for tensor in encode(tree)[1].values()}


@pytest.mark.parametrize("method", one_of_each(every_method(3)), ids=str)
def test_what_is_predicted_is_what_is_recorded(method: Method) -> None:
    """The bytes that a checkpoint holds, and the messages that it waits for, before every tick of a run in one process."""
    box = Mailbox()
    workers = [Worker(job, box.end(job.k), CPU, lambda event: None) for job in jobs("conv", 3, method, samples=24, evaluate=False)]
    engines, length = [worker.engine for worker in workers], workers[0].job.length
    for engine in engines:
        engine.stage.resumable = True
    whole = unroll(method, 3, length).columns
    seen = [StageMemory(k, sizes(engine.stage), saves=True, mixed=method.mixed) for k, engine in enumerate(engines)]
    late = [(0, 0)] * 3
    with torch.random.fork_rng(devices=[]):
        for tick, plan in enumerate(windows(method, 3, length, 1)):
            for k, engine in enumerate(engines):
                record = engine.record(tick)
                held = sum(one.nbytes for one in encode(without_messages(record.copy["stage"]))[1].values())
                assert seen[k].recorded(engine.stage.version) == pytest.approx(held, abs=100)  # numbers that are tensors
                late[k] = max(late[k][0], record.late.due[k - 1]), max(late[k][1], record.late.due[k + 1])
            run_here(plan, engines)
            for k, column in enumerate(plan.columns):
                for step in column:
                    seen[k].execute(step)
    assert late == [under_way(whole, k) for k in range(3)]


def sizes(stage: Stage) -> StageBytes:
    """The bytes of what a stage of the tiny network holds, messages left out."""
    nothing = StageBytes(*[0] * 14)
    weights, head = (sum(w.nbytes for w in part.weights.values()) if part else 0 for part in (stage.body, stage.head))
    buffers = sum(buffer.nbytes for buffer in stage.module.buffers())
    return replace(nothing, weights=weights, head_weights=head, state=weights + head, fixed=buffers, written=buffers)


def without_messages(state: dict[str, Any]) -> dict[str, Any]:
    """The recorded state of a stage, without the inputs of its batches."""
    return {**state, "in_flight": [{**held, "message": None} for held in state["in_flight"].values()]}


def slow_disk(rank: Rank, job: StageJob) -> int:
    """Trains stage job.k, with a disk that writes the one checkpoint at the end of the run; returns the peak as `allocated` does."""
    ends, write, close = Flag(), Saver._write, Saver.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "_write", lambda *args, **more: ends.wait(60) and write(*args, **more))
        patch.setattr(Saver, "close", lambda saver: (ends.set(), close(saver))[-1])
        return allocated(rank, job)


@pytest.mark.parametrize("method", [FDG(), FDG(at="mixed")], ids=str)
def test_the_prediction_with_a_checkpoint_is_what_the_allocator_gives_out(method: Method, tmp_path: Path) -> None:
    """The checkpoint is held from the middle of the run to its end; its size on disk was predicted, too."""
    wide = [nn.Linear(768, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 768), nn.ReLU(), nn.Linear(768, 10)]
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    request = Request(nn.Sequential(nn.Flatten(), *wide), Batches(images), None, cross_entropy, method, sgd, cuts=[4], epochs=1,
                      placement=Placement(link="gloo"), checkpoint=Checkpoint(tmp_path, every=5))  # fmt: skip
    prepared = prepare(request)
    predicted = [one for one in prepared.memory() if one]
    measured = run_processes(slow_disk, prepared.jobs())
    assert [one.live for one in predicted] == pytest.approx(measured, rel=0.1)
    assert all(0.2 * one.live < one.saved for one in predicted)  # else it could have been left out
    [path] = newest_first(tmp_path)
    assert verified(path).size == pytest.approx(sum(one.saved for one in predicted), rel=0.05)


# ---- where they are written --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount a small disk")
def test_a_full_disk_is_seen_before_the_first_update(tmp_path: Path) -> None:
    """A disk of a megabyte: three checkpoints of 0.5 MB do not fit, two do."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", tmp_path], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a disk")
    told: list[Event] = []
    keeps: dict[str, Any] = {"every": 10}
    try:
        with pytest.raises(UsageError, match=r"the disk of \S+/below has 1.2 MB free, but .* need about 1.\d MB more, 0.\d MB each"):
            train(tmp_path / "new" / "below", width=150, keeps=keeps, callbacks=[told.append])
        assert not told
        assert not (tmp_path / "new").exists()
        train(tmp_path / "new", width=150, keeps={**keeps, "keep": 1}, callbacks=[told.append])
        train(tmp_path / "new", width=150, keeps={**keeps, "keep": 1, "resume": "newest"})  # what is there goes
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        with pytest.raises(UsageError, match="nothing can be written into"):
            train(tmp_path / "other")
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert [event.problem for event in told if isinstance(event, CheckpointRecord)] == ["", ""]


def test_room_is_needed_for_what_is_kept_and_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(total=1, free=free))
    for keeps, count in (({}, 1), ({"every": 5}, 3), ({"every": 5, "keep": 4}, 5), ({"every": 5, "best": "min:loss"}, 4)):
        with pytest.raises(UsageError, match=r"has 0\.0 MB free") as caught:
            train(tmp_path, width=500, keeps=keeps)
        need, one = map(float, re.findall(r"([\d.]+) MB (?:more|each)", str(caught.value)))
        assert need == pytest.approx(count * one, abs=0.3)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"but .*/file is not a folder: give another folder"):
            train(folder)
    if Path("/proc").is_dir():
        with pytest.raises(UsageError, match=r"the folder of checkpoints /proc/delock cannot be made: .*: give another folder"):
            train(Path("/proc/delock"))


def test_a_file_is_as_the_format_says(tmp_path: Path) -> None:
    """Read by the library for it; the sum is that of the bytes on disk."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "long": torch.randn(CHUNK // 4 + 5, 3, generator=draw),
        "odd": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5, generator=draw).bfloat16(),
        "transposed": torch.randn(4, 3, generator=draw).T,
        "number": torch.tensor(7),
        "none": torch.empty(0, 2),
        "complex": torch.randn(3, generator=draw, dtype=torch.complex64),
    }
    path = tmp_path / "tensors.safetensors"
    found = save(path, tensors, {"a": "ü"})
    written = path.read_bytes()
    assert found == (len(written), zlib.crc32(written))
    assert int.from_bytes(written[:8], "little") % 8 == 0  # so that the values are aligned
    again = load_file(path)
    assert again.keys() == tensors.keys()
    for name, one in tensors.items():
        assert again[name].dtype == one.dtype
        assert torch.equal(again[name], one)
    with pytest.raises(UsageError, match="odd one is float4_e2m1fn_x2, which a checkpoint cannot keep"):
        save(path, {"odd one": torch.empty(2, dtype=torch.float4_e2m1fn_x2)}, {})
