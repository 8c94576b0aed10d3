"""The engine's clock and its losses: time is accounted for to the second, micro-batches give the whole batch's step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delock.engine.engine
import delock.run.history
from delock.links import Message
from delock.methods import BP, DSP, FDG, GPipe, Method, OneFOneB
from delock.run.inline import run_inline

import oracles
from chain import Chain, seeded, vectors
from harness import inline, jobs
from workloads import WORK, batches, sgd, warm_up

# -- time --------------------------------------------------------------------------------------------------------------------------


class Hands:
    """The hands of a clock that stands still until somebody moves them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def __deepcopy__(self, memo: Any) -> Hands:
        return self


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    made = Hands()
    monkeypatch.setattr(delock.engine.engine, "perf_counter", made)
    monkeypatch.setattr(delock.run.history.time, "perf_counter", made)
    return made


class Slow(nn.Module):
    """Identity that takes its time: `train` seconds for a forward, twice that for a backward, `test` for an evaluation."""

    def __init__(self, hands: Hands, train: float, test: float) -> None:
        super().__init__()
        self.hands, self.seconds, self.w = hands, {True: train, False: test}, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.hands.now += self.seconds[self.training]
        y: Tensor = _Drag.apply(x * self.w, self.hands, 2 * self.seconds[True])
        return y


class _Drag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, hands: Hands, seconds: float) -> Tensor:
        ctx.late = hands, seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hands, seconds = ctx.late
        hands.now += seconds
        return grads[0], None, None


class Late:
    """A link over which everything comes two seconds after it was asked for."""

    decoding = 0.0

    def __init__(self, link: Any, hands: Hands) -> None:
        self.link, self.hands, self.send = link, hands, link.send

    def receive(self, source: int, name: Any) -> Message:
        self.hands.now += 2
        message: Message = self.link.receive(source, name)
        return message


def test_time_is_accounted_for_to_the_second(hands: Hands) -> None:
    """Waiting is not work, an evaluation is neither, and all of it together is the stage's time."""
    chain = Chain([Slow(hands, 1, 50), Slow(hands, 3, 70)], FDG(), vectors(6), test=vectors(2), every=3)
    for engine in chain.engines:
        engine.link = Late(engine.link, hands)
    chain.run()
    lower, upper = (engine.log for engine in chain.engines)
    assert lower.seconds == {"forward": 6, "backward": 6 * 2, "update": 0, "saving": 0, "waiting": 6 * 2, "evaluation": 2 * 2 * 50}
    assert upper.seconds == {"forward": 6 * 3, "backward": 6 * 6, "update": 0, "saving": 0, "waiting": 6 * 2, "evaluation": 4 * (70 + 2)}
    for log in (lower, upper):
        spans = log.spans or []
        assert sum(s.end - s.start + s.waited for s in spans) == sum(log.seconds.values())
        assert sum(s.waited for s in spans) == log.seconds["waiting"] + (8 if log is upper else 0)
        assert all(s.end - s.start in (0, 1, 2, 3, 6, 50, 70) for s in spans), "a wait counts as work"
        assert log.first == min(s.start - s.waited for s in spans)
        assert log.last == max(s.end for s in spans)


class Full:
    """A link that has no room: a message goes on its way three seconds after it was handed over."""

    decoding = 0.0

    def __init__(self, link: Any, hands: Hands) -> None:
        self.link, self.hands, self.receive = link, hands, link.receive

    def send(self, to: int, name: Any, message: Message) -> float:
        self.hands.now += 3
        return 3.0 + float(self.link.send(to, name, message))


def test_to_wait_for_room_is_no_work(hands: Hands) -> None:
    chain = Chain([Slow(hands, 1, 50), Slow(hands, 3, 70)], FDG(), vectors(6), test=vectors(2), every=3)
    for engine in chain.engines:
        engine.link = Full(engine.link, hands)
    chain.run()
    lower, upper = (engine.log for engine in chain.engines)
    assert lower.seconds == {"forward": 6, "backward": 6 * 2, "update": 0, "saving": 0, "waiting": 6 * 3, "evaluation": 2 * 2 * (50 + 3)}
    assert upper.seconds == {"forward": 6 * 3, "backward": 6 * 6, "update": 0, "saving": 0, "waiting": 6 * 3, "evaluation": 2 * 2 * 70}
    assert [sum(span.full for span in log.spans or []) for log in (lower, upper)] == [6 * 3 + 2 * 2 * 3, 6 * 3], "why it waited"


@pytest.mark.parametrize("method", [BP(), FDG(), DSP()], ids=str)
def test_training_time_leaves_out_every_evaluation(hands: Hands, method: Method) -> None:
    """Inline also those of the other stages, and in the record of an evaluation the one it reports."""
    replays = 5 if isinstance(method, DSP) else 0  # stage 0 keeps the graph of its first batch alone
    made = jobs("mlp", 2, method, samples=24, batch=8, epochs=2)  # six batches, two evaluations of three batches
    for job in made:
        job.module.append(Slow(hands, 1, 1000))
    told: list[Any] = []
    results = run_inline(made, torch.device("cpu"), told.append)
    assert [r.seconds for r in results] == [6 * 2 * (1 + 2) + replays] * 2
    assert all(e.seconds <= results[0].seconds for e in results[1].evaluations)
    assert results[1].evaluations[-1].seconds == results[0].seconds
    steps = [event for event in told if hasattr(event, "lr")]
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(steps))
    assert steps[-1].seconds <= results[0].seconds


# -- losses ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("method", [BP(4), GPipe(4), OneFOneB(4)], ids=str)
def test_micro_batches_give_the_loss_and_the_step_of_the_whole_batch(method: Method, K: int) -> None:
    """Seven samples in batches of five and two: the parts of the second are one, one and two empty ones."""
    results = inline(jobs("mlp", K, method, samples=7, batch=5, epochs=3, dtype=torch.float64))
    net, kind, loss = WORK["mlp"]
    made = batches(7, 5, 3, kind, torch.float64)
    want = oracles.backprop(net(K, torch.float64), made, loss=loss, make_optimizer=sgd, make_schedule=warm_up, seed=7)
    assert oracles.gap(torch.tensor(results[-1].losses, dtype=torch.float64), torch.stack(want.losses)) <= 1e-10
    assert oracles.gap([r.state for r in results], want.states) <= 1e-10
    assert results[-1].samples == 21
    assert [r.report.updates for r in results] == [6] * K


# -- progress ----------------------------------------------------------------------------------------------------------------------


class Notes:
    def __init__(self) -> None:
        self.ops: list[str] = []

    def at(self, op: str, batch: str = "") -> None:
        self.ops.append(op)


def test_every_op_is_announced_and_logged_in_its_order() -> None:
    chain = Chain(seeded(lambda: [nn.Linear(4, 4), nn.Linear(4, 4)]), FDG(), vectors(3), test=vectors(1), every=2)
    notes = chain.engines[0].progress = Notes()
    chain.run()
    assert notes.ops == ["F0", "F1", "E0", "F2", "B0", "U", "B1", "U", "B2", "U", "E1"]
    assert [span.op for span in chain.spans[0]] == [step.op for step in chain.plan().columns[0]]
