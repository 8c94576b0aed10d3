"""Checkpoints of free-running stages: what is saved at a mark, what goes on from there, and that it can be done again from there."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import delock
from delock.checkpoints.directory import newest_first, verified
from delock.codecs import VQ
from delock.engine.agreement import Wish
from delock.engine.asynchronous.buffer import ReplayBuffer
from delock.engine.asynchronous.link import FreeLink
from delock.engine.asynchronous.runner import FreeRun
from delock.engine.asynchronous.schedule import recorded
from delock.errors import UsageError
from delock.launch.progress import Progress
from delock.links.coded import ReceivedCodebooks
from delock.links.stream import StreamWays
from delock.methods import AsyncDGL
from delock.ops import Forward, Update
from delock.options import Compression, Simulation
from delock.plan import Plan
from delock.records import CheckpointRecord, Cut, Event, StepRecord, Visit, VisitsRecord
from delock.run.survival.free_checkpointing import FreeSaver
from delock.run.survival.parts import cuts
from delock.run.worker import Worker

from free_runs import Listener, assert_counted, assert_in_order
from harness import CPU, jobs, same_state, saved_and_loaded
from survivors import BATCHES, SGD, Killer, Run, data, network, train

CUTS: dict[int, list[int]] = {2: [5], 3: [3, 6]}
METHOD = AsyncDGL(3)
EVALUATED = 2 * BATCHES // 4  # test batches
pytestmark = pytest.mark.usefixtures("own_random")


class Gate(nn.Module):
    """The identity; in a stage's process the forward of that number waits for a file."""

    def __init__(self, path: Path | None, at: int) -> None:
        super().__init__()
        self.path, self.at, self.forwards = path, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if self.path and self.forwards == self.at and parent_process() is not None:
            deadline = time.monotonic() + 60
            while not self.path.exists():
                assert time.monotonic() < deadline
                threading.Event().wait(0.002)
        return x


def run(folder: Path | None, K: int, method: AsyncDGL, gates: dict[int, Gate] | None = None, **more: Any) -> Run:
    """Trains the network of `survivors`, with a gate in the first stage and one in the last."""
    first, last = ((gates or {}).get(k, Gate(None, 0)) for k in (0, K - 1))
    layers = list(network())
    model = nn.Sequential(first, *layers[:6], last, layers[6])
    kept = {"checkpoint": delock.Checkpoint(folder, **more.pop("keeps", {}))} if folder else {}
    given = {"batches": BATCHES, "optimizer": SGD, "report": delock.Report(log_every=1), "heads": "linear", "cuts": CUTS[K], **more}
    return model, delock.fit(model, data(), data(2, 1), loss=nn.functional.cross_entropy, method=method, **given, **kept)


def free(folder: Path | None, K: int, hear: Any, method: AsyncDGL = METHOD, **more: Any) -> Run:
    """A free run in processes."""
    return run(folder, K, method, workers="processes", callbacks=[hear], **more)


def again(heard: Listener, method: AsyncDGL = METHOD, start: Path | None = None, **more: Any) -> Run:
    """The same visits in one process, from the first or from a checkpoint."""
    keeps = {"keeps": {"resume": start}} if start else {}
    replay = Simulation(replay=heard.turns)
    return run(start and start.parent, len(heard.turns), method, workers="inline", simulation=replay, **keeps, **more)


def assert_sound(done: Run, heard: Listener, folder: Path, method: AsyncDGL = METHOD, evaluated: int = EVALUATED, **more: Any) -> None:
    """The visits that count are those of one run, and done again they give its bits: from the first, and from every checkpoint."""
    model, result = done
    batches = more.get("batches", BATCHES)
    assert [stage.updates for stage in result.stages] == [batches] * len(heard.turns)
    assert_in_order(heard.turns, method, batches, evaluated)
    assert_counted(result.stages, heard.turns)
    starts = [None, *newest_first(folder)]
    assert len(starts) > 1
    for start in starts:
        other, repeated = again(heard, method, start, **more)
        assert same_state(model.state_dict(), other.state_dict()), start
        assert result.losses == repeated.losses
        assert [e.test_loss for e in result.evaluations] == [e.test_loss for e in repeated.evaluations]


# -- parts of it -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_reuse", [0, 2])
def test_a_buffer_that_was_saved_goes_on_as_if_nothing_had_happened(max_reuse: int) -> None:
    draw = random.Random(max_reuse)
    whole, first = ReplayBuffer[str](3, max_reuse), ReplayBuffer[str](3, max_reuse)
    for n in range(200):
        if n % 20 == 10:
            [state] = saved_and_loaded([first.state(lambda item: {"text": item})])
            first = ReplayBuffer(3, max_reuse)
            first.load(state, lambda values: values["text"])
        if draw.random() < 0.4:
            for buffer in (whole, first):
                buffer.put(f"item {n}", n, n // 2)
        else:
            assert whole.get() == first.get()
    assert whole.close() == first.close()


def visit(n: int, source: int, *, trains: bool = True) -> Visit:
    return Visit(n, source, trains, n)


def sources(plan: Plan, k: int) -> list[tuple[int, int | None]]:
    return [(step.op.batch, step.op.source) for step in plan.columns[k] if isinstance(step.op, Forward)]


def test_a_plan_from_a_checkpoint_begins_with_what_the_buffers_held() -> None:
    below = [visit(n, n) for n in range(6)]
    above = [visit(0, 0), visit(1, 1), visit(2, 2), visit(3, 1), visit(4, 3), visit(5, 5)]
    plan, whole = recorded([below, above], None, [Cut(3, 0), Cut(2, 0, (1, 2))])
    assert whole
    assert [sources(plan, k) for k in range(2)] == [[(3, 3), (4, 4), (5, 5)], [(2, 2), (3, 1), (4, 3), (5, 5)]]
    plan, whole = recorded([below, above], None, [Cut(3, 0), Cut(2, 0, (2,))])  # batch 1 is nowhere
    assert not whole
    assert sources(plan, 1) == [(2, 2)]
    test = [Visit(n, -1, False, 3, evaluates=True) for n in range(4)]
    plan, whole = recorded([[*below[:3], *test[2:], *below[3:]]], None, [Cut(2, 3)])
    assert [step.op.batch for step in plan.columns[0] if not isinstance(step.op, Update)][:2] == [2, 2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": AsyncDGL(order="sampled"), "workers": "inline"}, "turns that are drawn for a whole run cannot be saved"),
        ({"method": AsyncDGL(order="round-robin"), "workers": "inline"}, "use order free, or leave checkpoint out"),
        (
            {"simulation": Simulation(replay=[[], []]), "keeps": {"resume": "newest", "every": 3}},
            "begins where resume says and writes none",
        ),
        ({"simulation": Simulation(replay=[[], []])}, "checkpoint does not go with replay"),
    ],
)
def test_what_is_refused(tmp_path: Path, given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        train(tmp_path / "there", **{"method": AsyncDGL(), "cuts": [4], **given})
    assert not list(tmp_path.iterdir())


def test_what_an_earlier_run_left_half_written_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    """Two stages of it had written their parts of batch 5, which are not those of this run."""
    Path(tmp_path / ".batch-00000005").mkdir()
    for k in range(1, 3):
        done = {"updates": 1, "files": {f"optimizer-{k}.safetensors": [1, 1]}, "known": {}}
        Path(tmp_path / ".batch-00000005" / f"done-{k}.json").write_text(json.dumps(done))
    events: list[Event] = []
    train(tmp_path, batches=8, keeps={"every": 5}, callbacks=[events.append])
    assert [one.problem for one in events if isinstance(one, CheckpointRecord)] == [""]
    assert verified(tmp_path / "batch-00000005").updates == (1, 2, 3)


def test_between_two_marks_there_is_a_visit(tmp_path: Path) -> None:
    """Asked twice at every visit; from the second question at the sixth on, the run is to end."""
    job, asked = replace(jobs("conv", 2, METHOD)[0], checkpoint=delock.Checkpoint(tmp_path, every=3)), list[int]()
    link = FreeLink(0, 2, ReplayBuffer(1), CPU, Progress(), lambda: 0, ReceivedCodebooks(), StreamWays(0, {}))
    worker = Worker(job, link, CPU, lambda event: None, asked=lambda: bool(asked))
    free_run = FreeRun(worker.engine, link, job.length, lambda record: None)
    assert isinstance(worker.saver, FreeSaver)
    worker.saver.follow(free_run)
    wishes = []
    for n in range(8):
        free_run.ordinal = free_run.updates = n
        wishes.append(free_run.wish(free_run))
        asked += [n] * (n == 6)
        wishes.append(free_run.wish(free_run))
    save, stop, no = [Wish.SAVE, Wish.NOTHING], [Wish.STOP] * 2, [Wish.NOTHING] * 2
    assert wishes == [*no, *no, *no, *save, *no, *no, *save, *stop]


# -- runs --------------------------------------------------------------------------------------------------------------------------


class Stopper:
    """Asks the run to end, as Ctrl-C does, when stage k (-1: the last) has trained so many batches, for all k in `when`; then gates open.

    That a stage stands at a gate, only the last one tells at once.
    """

    def __init__(self, gate: Path, when: dict[int, int]) -> None:
        self.gate, self.when, self.trained = gate, when, Counter[int]()

    def __call__(self, event: Event) -> None:
        if isinstance(event, VisitsRecord):
            self.trained[event.stage] += sum(visit.trains for visit in event.visits)
        if isinstance(event, StepRecord):
            self.trained[-1] = event.batches
        if not self.gate.exists() and all(self.trained[k] >= count for k, count in self.when.items()):
            signal.raise_signal(signal.SIGINT)
            self.gate.touch()


def stopped(folder: Path, K: int, when: dict[int, int], gate: tuple[int, int], method: AsyncDGL = METHOD, **more: Any) -> Listener:
    """A run that was stopped and saved; what it told. when: see Stopper. gate: the stage that stands still until then, and its forward."""
    opened = folder.with_name(f"{folder.name}-gate")
    heard = Listener(K, Stopper(opened, when))
    with pytest.raises(KeyboardInterrupt) as caught:
        free(folder, K, heard, method, gates={gate[0]: Gate(opened, gate[1])}, **more)
    assert any("the run is saved in" in note for note in caught.value.__notes__), (caught.value.__notes__, heard.written)
    assert heard.written[-1].last
    heard.then = lambda event: None
    return heard


def test_a_run_that_was_stopped_goes_on_and_can_be_done_again_from_any_checkpoint(tmp_path: Path) -> None:
    heard = stopped(tmp_path, 2, {-1: 12}, (0, 20), keeps={"every": 4, "keep": 10})
    path = Path(heard.written[-1].path)
    found = cuts(str(path), verified(path))
    made = [[sum(turn.evaluates is evaluates for turn in stage) for evaluates in (False, True)] for stage in heard.turns]
    assert [[cut.ordinal, cut.evaluated] for cut in found] == made, "the stages went on behind the mark, or told less than was saved"
    done = free(tmp_path, 2, heard, keeps={"resume": "newest", "keep": 10})
    assert [event.path for event in heard.resumed] == [str(path)]
    assert_sound(done, heard, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("K", [2, 3])
def test_a_stage_that_is_done_and_forwards_is_saved(tmp_path: Path, K: int) -> None:
    """Stage 0 has made its updates, the last stage stands at its fourth batch. An evaluation would not get past it."""
    heard = stopped(tmp_path, K, {0: BATCHES}, (K - 1, 4), eval_every=100)
    updates = verified(newest_first(tmp_path)[0]).updates
    assert updates[0] == BATCHES > updates[-1]
    done = free(tmp_path, K, heard, keeps={"resume": "newest"}, eval_every=100)
    assert_sound(done, heard, tmp_path, evaluated=2, eval_every=100)


@pytest.mark.slow
@pytest.mark.parametrize("K", [2, 3])
def test_stages_that_are_done_and_wait_for_evaluations_are_saved(tmp_path: Path, K: int) -> None:
    """All but stage 0 have made their updates, from the few batches that it has sent."""
    heard = stopped(tmp_path, K, dict.fromkeys([-1, *range(1, K - 1)], BATCHES), (0, 4))
    updates = verified(newest_first(tmp_path)[0]).updates
    assert updates[0] < BATCHES
    assert updates[1:] == (BATCHES,) * (K - 1)
    assert_sound(free(tmp_path, K, heard, keeps={"resume": "newest"}), heard, tmp_path)


@pytest.mark.slow
def test_batches_that_are_read_once(tmp_path: Path) -> None:
    method = AsyncDGL(2, 1)
    heard = stopped(tmp_path, 3, {-1: 2}, (0, 20), method)
    assert_sound(free(tmp_path, 3, heard, method, keeps={"resume": "newest"}), heard, tmp_path, method)


@pytest.mark.slow
def test_codebooks_are_those_of_the_mark(tmp_path: Path) -> None:
    compression = Compression(VQ(codes=4, dim=2, every=3))
    heard = stopped(tmp_path, 3, {-1: 12}, (0, 20), keeps={"every": 3, "keep": 10}, compression=compression)
    done = free(tmp_path, 3, heard, keeps={"resume": "newest", "keep": 10}, compression=compression)
    assert_sound(done, heard, tmp_path, compression=compression)


@pytest.mark.slow
def test_the_best_evaluation_is_kept_and_a_time_may_be_given(tmp_path: Path) -> None:
    heard = Listener(2)
    method = AsyncDGL(3, slow_stage=1, noise=0.5)
    done = free(tmp_path, 2, heard, method, keeps={"every": "0.01s", "keep": 1, "best": "min:loss"})
    assert len(heard.written) > 3
    whole = [verified(path) for path in newest_first(tmp_path)]
    assert 1 <= len(whole) <= 2
    least = min(e.test_loss for e in done[1].evaluations[:-1])
    assert least in [manifest.measures["loss"] for manifest in whole]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("K", [2, 3])
def test_a_run_survives_the_death_of_a_stage(tmp_path: Path, K: int, seed: int) -> None:
    method, killer = AsyncDGL(3, slow_stage=seed, noise=0.5), Killer(10 * K + seed, K, 240)
    heard = Listener(K, killer)
    done = free(tmp_path, K, heard, method, keeps={"every": 3, "keep": 10, "restarts": 1}, batches=240)
    assert killer.killed
    assert len(heard.resumed) == 1
    assert any(cut.held for cut in heard.resumed[0].cuts), "no replay buffer held a batch"
    assert_sound(done, heard, tmp_path, method, 10 * EVALUATED, batches=240)


@pytest.mark.slow
def test_a_longer_run_goes_on_and_a_shorter_one_does_not(tmp_path: Path) -> None:
    heard = stopped(tmp_path, 2, {0: BATCHES}, (1, 4), eval_every=100)
    with pytest.raises(UsageError, match="is at batch 24, but the run is to end at batch 20: let it be longer"):
        free(tmp_path, 2, heard, keeps={"resume": "newest"}, batches=20, eval_every=100)
    _, result = free(tmp_path, 2, heard, keeps={"resume": "newest"}, batches=BATCHES + 8, eval_every=100)
    assert [stage.updates for stage in result.stages] == [BATCHES + 8] * 2
    trained = [[turn.ordinal for turn in stage if turn.trains] for stage in heard.turns]
    assert list(map(len, trained)) == [BATCHES + 8] * 2
    assert heard.resumed[0].cuts[0].ordinal > BATCHES, "stage 0 forwarded nothing for the one above"
