"""Free-running stages in processes: what they leave on record, and that it can be done again to the last bit."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from delock.api import fit
from delock.codecs import VQ
from delock.engine.asynchronous.schedule import recorded
from delock.errors import StageFailed, UsageError
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.methods import AsyncDGL
from delock.nets.emulated import Emulated
from delock.ops import Evaluate, Forward, Update
from delock.options import Compression, Placement, Report, Simulation
from delock.plan import check
from delock.records import Event, StepRecord, Visit, VisitsRecord
from delock.run.inline import run_inline
from delock.run.job import StageJob, StageResult
from delock.run.ranks import run_rank

from free_runs import assert_counted, assert_in_order
from harness import CPU, jobs, same_tree
from workloads import sgd

# -- in processes ------------------------------------------------------------------------------------------------------------------


def free(made: list[StageJob], **options: Any) -> tuple[list[StageResult], list[list[Visit]]]:
    """A free run; what its stages brought home, and their turns."""
    turns: list[list[Visit]] = [[] for _ in made]

    def hear(rank: int, event: Any) -> None:
        if isinstance(event, VisitsRecord):
            assert event.stage == rank
            turns[rank] += event.visits

    return run_processes(run_rank, made, threads=1, pin=False, patience=30, on_event=hear, **options), turns


def again(made: list[StageJob], turns: Sequence[Sequence[Visit]]) -> list[StageResult]:
    return run_inline([replace(job, simulation=Simulation(replay=turns)) for job in made], CPU, lambda event: None)


def assert_replayed(run: list[StageResult], replay: list[StageResult]) -> None:
    """Weights, buffers, heads, optimizers, losses and evaluations, to the last bit."""
    for one, other in zip(run, replay, strict=True):
        same_tree((one.state, one.head, one.optimizer, one.losses), (other.state, other.head, other.optimizer, other.losses))
        same_tree([(e.batches, repr(e.test_loss)) for e in one.evaluations], [(e.batches, repr(e.test_loss)) for e in other.evaluations])


RUNS: dict[str, tuple[str, int, AsyncDGL, dict[str, Any]]] = {
    "slowed": ("conv", 4, AsyncDGL(5, slow_stage=1, noise=0.5), {"samples": 160, "epochs": 10}),  # 200 updates
    "once more": ("tuple", 4, AsyncDGL(1, slow_stage=3, noise=0.5), {"samples": 160, "epochs": 10}),
    "read once": ("conv", 3, AsyncDGL(3, 1, slow_stage=0, noise=0.5), {"epochs": 10}),
    "clipped": ("conv", 3, AsyncDGL(2, 2), {"epochs": 10, "clip": 0.3}),
    "encoded": ("conv", 3, AsyncDGL(4), {"epochs": 10, "codec": VQ(codes=4, dim=2, every=3)}),
    "of two": ("tuple", 2, AsyncDGL(5), {"epochs": 10, "evaluate": False}),
    "over gloo": ("tuple", 3, AsyncDGL(3), {"epochs": 10, "link": "gloo"}),
    "alone": ("conv", 1, AsyncDGL(5), {"epochs": 4}),
}


def jobs_of(name: str) -> list[StageJob]:
    work, K, method, options = RUNS[name]
    options = dict(options)
    clip, codec = options.pop("clip", None), options.pop("codec", None)
    made = jobs(work, K, method, **{"link": "auto", **options})
    return [replace(job, compression=Compression(codec or "none"), length=replace(job.length, clip=clip)) for job in made]


SELDOM = ("once more", "of two", "alone")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SELDOM else []) for name in RUNS])
def test_a_free_run_is_done_again_to_the_last_bit(name: str) -> None:
    _, K, method, _ = RUNS[name]
    made = jobs_of(name)
    length = made[0].length
    run, turns = free(made)
    assert multiprocessing.active_children() == []
    assert [result.report.updates for result in run] == [length.batches] * K
    evaluations = length.evaluation * (length.batches // length.every) if length.every else 0
    assert_in_order(turns, method, length.batches, evaluations)
    assert_replayed(run, again(jobs_of(name), turns))
    assert_accounted(run, turns)


def assert_accounted(run: list[StageResult], turns: list[list[Visit]]) -> None:
    """The reports on buffers and time fit the turns."""
    reports = [result.report for result in run]
    assert_counted(reports, turns)
    for report in reports:
        spin = report.forward + report.backward + report.update + report.evaluation + report.waiting
        assert 0.7 * report.seconds <= spin <= report.seconds + 1e-6, "there is time of which nobody knows where it went"


def impatient(rank: Rank, payload: tuple[StageJob, str]) -> StageResult:
    """A stage in a process group that waits for a second, where others wait for half an hour."""
    job, meeting = payload
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(seconds=1), rank.world, rank.rank)
    return run_rank(rank, job)


def test_a_run_may_be_longer_than_the_limit_of_a_wait(tmp_path: Path) -> None:
    """Stage 0 hears nothing from above until all are done, and stages 1 and 2 nothing from below while it makes its last updates."""
    made = jobs("conv", 3, AsyncDGL(2), epochs=10, evaluate=False)
    made[0].module = Emulated((4, 8, 8), 0.07, 0.0)  # 30 updates in two seconds
    run = run_processes(impatient, [(job, str(tmp_path / "meeting")) for job in made], threads=1, pin=False, patience=30)
    assert [result.report.updates for result in run] == [30] * 3
    assert run[0].report.seconds > 2
    assert all(result.report.seconds < run[0].report.seconds / 2 for result in run[1:]), "they were as slow"


def paced(made: list[StageJob], seconds: float) -> list[StageJob]:
    """The same jobs, whose stages take that long for a batch, more or less, on any machine."""
    x = next(iter(made[0].train.epoch(0)))[0]  # type: ignore[union-attr]
    for job in made:
        y = job.module.eval()(x)
        job.module = nn.Sequential(Emulated(tuple(x.shape[1:]), seconds / 3, seconds * 2 / 3), job.module.train())
        x = y.detach()
    return made


def test_time_is_waited_where_there_is_nothing_to_read() -> None:
    """Every batch may be read once, and stage 0 takes three times as long: the others wait two thirds of the time, it does not."""
    run, _ = free(paced(jobs("conv", 3, AsyncDGL(1, 1, slow_stage=0, noise=2 / 3), epochs=10, evaluate=False), 0.012))
    slow, *others = [result.report for result in run]
    assert slow.idle < 0.1
    for report in others:
        assert 0.55 < report.idle < 0.85
        assert report.waiting == pytest.approx(report.idle * report.seconds, rel=0.05)


# -- a trace that was cut off ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced() -> tuple[list[StageResult], list[list[Visit]]]:
    torch.set_num_threads(1)
    return free(jobs_of("slowed"))


def test_any_cut_leaves_a_plan_that_can_run(traced: tuple[Any, list[list[Visit]]]) -> None:
    _, turns = traced
    plan, whole = recorded(turns)
    check(plan)
    assert whole
    draw, seen = random.Random(0), set()
    for _ in range(40):
        cut = [stage[: draw.choice([0, 1, len(stage) // 3, len(stage) // 2, len(stage) - 1, len(stage)])] for stage in turns]
        plan, whole = recorded(cut)
        seen.add(whole)
        check(plan)
        forwards = [[step.op for step in column if isinstance(step.op, Forward | Evaluate)] for column in plan.columns]
        for stage, ops in zip(cut, forwards, strict=True):
            assert [(turn.ordinal, turn.evaluates) for turn in stage][: len(ops)] == [(op.batch, isinstance(op, Evaluate)) for op in ops]
        assert whole == (list(map(len, cut)) == list(map(len, forwards)))
        for k in range(1, 4):  # the first turn that is left out reads what is missing
            if len(forwards[k]) < len(cut[k]):
                missing = cut[k][len(forwards[k])]
                below = {(op.batch, isinstance(op, Evaluate)) for op in forwards[k - 1]}
                assert (missing.ordinal if missing.evaluates else missing.source, missing.evaluates) not in below
    assert seen == {True, False}


def test_a_run_that_was_cut_off_is_done_again_as_far_as_it_goes(traced: tuple[list[StageResult], list[list[Visit]]]) -> None:
    """Stages 0 and 1 do not depend on those above; of stage 3 nothing is left, and stage 2 stops where its reads do."""
    run, turns = traced
    replay = again(jobs_of("slowed"), [*turns[:2], turns[2][:50], []])
    for one, other in zip(run[:2], replay[:2], strict=True):
        same_tree((one.state, one.head), (other.state, other.head))
    assert replay[2].report.updates == sum(turn.trains for turn in turns[2][:50])
    assert (replay[3].report.updates, replay[3].losses) == (0, [])
    part = again(jobs_of("slowed"), [turns[0][:40], *turns[1:]])
    assert [result.report.updates for result in part] == [sum(isinstance(step.op, Update) for step in column)
                                                          for column in recorded([turns[0][:40], *turns[1:]])[0].columns]  # fmt: skip
    assert part[0].report.updates <= 40


@pytest.mark.usefixtures("own_random")
def test_turns_of_another_number_of_stages() -> None:
    net, data = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), [(torch.randn(6, 4), torch.randint(2, (6,)))]
    with pytest.raises(UsageError, match="visits of 3 stages cannot be done again by 2"):
        fit(net, data, loss=nn.functional.cross_entropy, method=AsyncDGL(), optimizer=sgd, batches=1, workers="inline",
            simulation=Simulation(replay=[[]] * 3))  # fmt: skip
    with pytest.raises(UsageError, match="recorded visits are done again in one process"):
        fit(net, data, loss=nn.functional.cross_entropy, method=AsyncDGL(), optimizer=sgd, batches=1,
            simulation=Simulation(replay=[[]] * 2))  # fmt: skip


# -- runs that cannot go on --------------------------------------------------------------------------------------------------------


class Trouble(nn.Module):
    """The identity until the fifth training batch, in a stage's process; ends the process, raises, or does not come back."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.batch = how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.batch += 1
        if self.batch >= 5 and parent_process() is not None:
            match self.how:
                case "raise":
                    raise ZeroDivisionError("the culprit's own words")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    threading.Event().wait()
        return x


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raise", r"stage 1 failed in F4 \(forward of batch 4, tick 4\): ZeroDivisionError: the culprit's own words\n"),
        ("kill", r"stage 1 was killed by SIGKILL .* in F4 \(forward of batch 4, tick 4\)"),
        ("hang", r"stage 1 hangs in F4 \(forward of batch 4, tick 4\): it has not moved for \d+ s\nstage 0 (is|waits)"),
    ],
)
def test_a_stage_in_trouble_ends_the_run_and_is_named(how: str, expected: str) -> None:
    """Though nobody waits for it, and the stage below would go on for ever."""
    net = nn.Sequential(nn.Linear(4, 8), Trouble(how), nn.Linear(8, 8), nn.Linear(8, 2))
    batches = [(torch.randn(6, 4), torch.randint(2, (6,))) for _ in range(12)]
    heard = [time.monotonic()]

    def note(event: Event) -> None:
        if isinstance(event, StepRecord):
            heard.append(time.monotonic())

    with pytest.raises(StageFailed) as caught:
        fit(net, batches, loss=nn.functional.cross_entropy, method=AsyncDGL(3), cuts=[1, 2], epochs=1000,
            report=Report(log_every=1), placement=Placement(patience=2),
            optimizer=functools.partial(torch.optim.SGD, lr=0.1), callbacks=[note])  # fmt: skip
    assert time.monotonic() - heard[-1] < 15
    assert re.match(expected, str(caught.value)), str(caught.value)
    assert multiprocessing.active_children() == []
