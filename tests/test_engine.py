"""What the engine does and measures: staleness down to the weights in the Jacobians, time, losses, and how a run ends that cannot go on."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delock.engine.engine
import delock.run.ranks
import delock.run.worker
from delock.engine.engine import run_here
from delock.errors import NonFinite, StageFailed, UsageError
from delock.links import Message
from delock.methods import ADL, BP, DDG, DSP, FDG, FR, GPipe, Method, OneFOneB
from delock.ops import Update
from delock.plan import Step
from delock.timeline import gradient_staleness, layer_staleness

import oracles
from chain import Chain, seeded, vectors
from harness import in_processes, inline, jobs
from workloads import WORK, batches, sgd, warm_up

BATCHES, LAYERS = 25, 8  # the last group of M = 2, 3, 4 is incomplete

# -- staleness, measured -----------------------------------------------------------------------------------------------------------


class Clock(nn.Module):
    """A linear layer whose bias counts the updates it has had (see Ticking), and that notes, for the batch in its first entry, the count
    that its forwards saw and the count that autograd used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.updates = nn.Parameter(torch.zeros(1))
        self.forwards: dict[int, list[int]] = {}
        self.jacobians: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.setdefault(int(x[0, 0]), []).append(int(self.updates))
        y: Tensor = _Look.apply(x, self.updates, self.jacobians)
        return y


class _Look(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, updates: Tensor, found: dict[int, int]) -> Tensor:
        ctx.save_for_backward(x, updates)
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, updates = ctx.saved_tensors
        ctx.found[int(x[0, 0])] = int(updates)
        return grads[0], torch.ones(1), None


class Ticking(torch.optim.Optimizer):
    """Adds one to every weight that has a gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(1)


def ticking(method: Method, K: int) -> Chain:
    """A run of eight tiny layers in K stages."""
    bounds = [-(-LAYERS * k // K) for k in range(K + 1)]
    modules = [nn.Sequential(*(Clock() for _ in range(z - a))) for a, z in itertools.pairwise(bounds)]
    data = [(torch.full((2, 1), float(b)), torch.zeros(2)) for b in range(BATCHES)]
    return Chain(modules, method, data, loss=lambda out, y: out.sum(), optimizer=Ticking)


def lags(method: Method, K: int) -> list[int]:
    """D_k from the lags of the spec, not from the method's own formula."""
    links = K - 1
    p, q = {"ddg": (0, 1), "fr": (0, 1), "fdg": (1, 1), "adl": (1, 1), "dsp": (1, 1)}.get(method.name, (0, 0))
    ps, qs = [p] * links, [q] * links
    if method == DSP(p=2, q=3):
        ps, qs = [2] * links, [3] * links
    return oracles.delays_of(ps, qs)


def expected(method: Method, K: int, k: int) -> tuple[list[int], list[int]]:
    """Per batch: the version its forward used, and the version it was applied to."""
    M, D = method.batches_per_update, lags(method, K)[k]
    e = int(getattr(method, "order", "") == "backward-first" and k < K - 1)
    return [max(0, b - D + e) // M for b in range(BATCHES)], [b // M for b in range(BATCHES)]


DELAYED: list[Method] = [
    DDG(),
    FR(),
    DSP(),
    DSP(p=2, q=3),
    *(FDG(at=at, order=order) for at in ("stash", "mixed") for order in ("forward-first", "backward-first")),
    *(ADL(accumulate=M, order=order) for M in (1, 2, 3, 4) for order in ("forward-first", "backward-first")),
    ADL(accumulate=3, at="mixed", order="backward-first"),
]


@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("method", DELAYED, ids=str)
def test_staleness_is_the_formulas_for_every_batch(method: Method, K: int) -> None:
    """In the weights themselves, in what the stage says, in the spans, and in the histograms; warm-up and drain included."""
    chain = ticking(method, K)
    said: list[dict[int, int]] = [{} for _ in range(K)]
    for k, s in enumerate(chain.stages):

        def look(step: Step, k: int = k, s: Any = s, prepare: Callable[[Step], None] = s.prepare) -> None:
            prepare(step)
            said[k][step.op.batch] = s.version - s.memory[step.op.batch].taken

        s.prepare = look
    chain.run()
    replay = isinstance(method, FR | DSP)
    for k, stage in enumerate(chain.stages):
        used, applied = expected(method, K, k)
        count_staleness = [0 if replay else a - u for u, a in zip(used, applied, strict=True)]
        assert list(said[k].values()) == count_staleness
        assert gradient_staleness(chain.spans[k]) == dict(enumerate(count_staleness))
        assert layer_staleness(chain.spans[k]) == dict.fromkeys(range(BATCHES), lags(method, K)[k])
        log = chain.engines[k].log
        assert (log.staleness, log.layer_staleness) == (Counter(count_staleness), Counter({lags(method, K)[k]: BATCHES}))
        for layer in stage.module:
            assert [layer.forwards[b][0] for b in range(BATCHES)] == used
            at = used if getattr(method, "at", "") == "stash" or method.name == "ddg" else applied
            assert [layer.jacobians[b] for b in range(BATCHES)] == at
        assert [span.version for span in chain.spans[k] if isinstance(span.op, Update)] == list(range(applied[-1] + 1))


@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("method", [BP(), BP(3), GPipe(2), OneFOneB(4)], ids=str)
def test_synchronous_methods_are_never_stale(method: Method, K: int) -> None:
    chain = ticking(method, K).run()
    for spans, engine in zip(chain.spans, chain.engines, strict=True):
        parts = BATCHES * method.parts
        assert gradient_staleness(spans) == layer_staleness(spans) == dict.fromkeys(range(parts), 0)
        assert engine.log.staleness == engine.log.layer_staleness == Counter({0: parts})


def test_adl_in_the_published_example() -> None:
    """K = 3, M = 2, once warm: (2,2), (1,1), (0,0) forward-first and (2,1), (1,0), (0,0) backward-first; K = 8: 13 .. 1, 0."""
    for order, want in (("forward-first", [(2, 2), (1, 1), (0, 0)]), ("backward-first", [(2, 1), (1, 0), (0, 0)])):
        chain = ticking(ADL(order=order), 3).run()
        assert [tuple(gradient_staleness(spans)[b] for b in (14, 15)) for spans in chain.spans] == want
    chain = ticking(FDG(order="backward-first"), 8).run()
    assert [gradient_staleness(spans)[20] for spans in chain.spans] == [13, 11, 9, 7, 5, 3, 1, 0]


def test_processes_measure_the_same() -> None:
    method = ADL(accumulate=3)
    there, here = in_processes(jobs("mlp", 3, method, trace=True)), inline(jobs("mlp", 3, method, trace=True))
    for a, b in zip(there, here, strict=True):
        assert [(s.op, s.version, s.tick) for s in a.spans] == [(s.op, s.version, s.tick) for s in b.spans]
        assert Counter(gradient_staleness(a.spans).values()) == Counter(a.report.staleness)
        assert all(s.start <= s.end <= t.start for s, t in itertools.pairwise(a.spans))


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
    monkeypatch.setattr(delock.run.worker.time, "perf_counter", made)
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
    assert lower.seconds == {"forward": 6, "backward": 6 * 2, "update": 0, "waiting": 6 * 2, "evaluation": 2 * 2 * 50}
    assert upper.seconds == {"forward": 6 * 3, "backward": 6 * 6, "update": 0, "waiting": 6 * 2, "evaluation": 2 * 2 * (70 + 2)}
    for log in (lower, upper):
        spans = log.spans or []
        assert sum(s.end - s.start + s.waited for s in spans) == sum(log.seconds.values())
        assert sum(s.waited for s in spans) == log.seconds["waiting"] + (8 if log is upper else 0)
        assert all(s.end - s.start in (0, 1, 2, 3, 6, 50, 70) for s in spans), "a wait counts as work"
        assert log.first == min(s.start - s.waited for s in spans)
        assert log.last == max(s.end for s in spans)


class Full:
    """A link that has no room: a message goes on its way three seconds after it was handed over."""

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
    assert lower.seconds == {"forward": 6, "backward": 6 * 2, "update": 0, "waiting": 6 * 3, "evaluation": 2 * 2 * (50 + 3)}
    assert upper.seconds == {"forward": 6 * 3, "backward": 6 * 6, "update": 0, "waiting": 6 * 3, "evaluation": 2 * 2 * 70}
    assert [sum(span.full for span in log.spans or []) for log in (lower, upper)] == [6 * 3 + 2 * 2 * 3, 6 * 3], "why it waited"


@pytest.mark.parametrize("method", [BP(), FDG(), DSP()], ids=str)
def test_training_time_leaves_out_every_evaluation(hands: Hands, method: Method) -> None:
    """Inline also those of the other stages, and in the record of an evaluation the one it reports."""
    replays = 5 if isinstance(method, DSP) else 0  # stage 0 keeps the graph of its first batch alone
    made = jobs("mlp", 2, method, samples=24, batch=8, epochs=2)  # six batches, two evaluations of three batches
    for job in made:
        job.module.append(Slow(hands, 1, 1000))
    told: list[Any] = []
    results = delock.run.ranks.run_inline(made, torch.device("cpu"), told.append, threads=1)
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


# -- runs that cannot go on --------------------------------------------------------------------------------------------------------


def spoilt(at: int, value: float, n: int = 6) -> list[tuple[Tensor, Tensor]]:
    data = vectors(n, rows=4)
    data[at][1].fill_(value)
    return data


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("method", "which", "updates"),
    [
        (FDG(), "batch 3", "3 updates"),
        (BP(), "batch 3", "3 updates"),
        (ADL(3), "batch 3", "1 update"),
        (GPipe(2), r"batch 3 \(micro-batch 6\)", "3 updates"),
    ],
    ids=str,
)
def test_a_loss_that_is_no_number_names_batch_and_stage(method: Method, which: str, updates: str, value: float) -> None:
    chain = Chain(seeded(lambda: [nn.Linear(4, 4) for _ in range(3)]), method, spoilt(3, value))
    with pytest.raises(NonFinite, match=rf"the loss of {which} became {value} at stage 2, after {updates}; lower") as caught:
        run_here(chain.plan(), chain.engines)
    assert isinstance(caught.value, UsageError)
    assert len(chain.losses) == 3 * method.parts
    assert all(torch.isfinite(p).all() for s in chain.stages for p in s.module.parameters()), "the weights were spoilt"


class Raises(nn.Module):
    """Raises in its n-th call, or in the backward of it."""

    def __init__(self, where: str, n: int) -> None:
        super().__init__()
        self.where, self.n, self.calls, self.w = where, n, 0, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.n:
            if self.where == "forward":
                raise KeyError("the culprit's own words")
            y: Tensor = _Bad.apply(x * self.w)
            return y
        return x * self.w


class _Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise KeyError("the culprit's own words")


def bad_loss(out: Tensor, y: Tensor) -> Tensor:
    if float(y.max()) == 7:
        raise KeyError("the culprit's own words")
    return out.mean()


class BadSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise KeyError("the culprit's own words")


def bad_data(at: int) -> list[tuple[Tensor, Tensor]]:
    data = vectors(6)
    data[at] = (data[at][0], torch.full((3, 4), 7.0))
    return data


def failing(what: str) -> tuple[Chain, str, str]:
    """A run that fails, the beginning of its error, and a function that its traceback shows."""
    linear = seeded(lambda: [nn.Linear(4, 4) for _ in range(3)])
    match what:
        case "forward":
            linear[1] = Raises("forward", 3)
            return Chain(linear, FDG(), vectors(6)), "stage 1 failed in F2 (forward of batch 2, tick 3)", "in forward"
        case "replay":
            linear[0] = Raises("forward", 5)  # two forwards, and the graph of batch 0 was kept: the fifth call is batch 1's second
            return Chain(linear, FR(), vectors(6)), "stage 0 failed in B1 (backward of batch 1, tick 3)", "in prepare"
        case "backward":
            linear[1] = Raises("backward", 3)
            return Chain(linear, DDG(), vectors(6)), "stage 1 failed in B2 (backward of batch 2, tick 3)", "in backward"
        case "loss":
            return Chain(linear, FDG(), bad_data(4), loss=bad_loss), "stage 2 failed in B4 (backward of batch 4, tick 6)", "in bad_loss"
        case "optimizer":
            chain = Chain(linear, BP(), vectors(6), optimizer=lambda params: BadSGD(params, lr=0.1))
            return chain, "stage 2 failed in U (update, tick 0)", "in step"
        case "evaluation":
            linear[1] = Raises("forward", 4)
            chain = Chain(linear, BP(), vectors(6), test=vectors(2), every=3)
            return chain, "stage 1 failed in E0 (evaluation, batch 0, tick 3)", "in forward"
        case "micro-batch":
            linear[1] = Raises("forward", 4)
            return Chain(linear, GPipe(2), vectors(6)), "stage 1 failed in F3 (forward of micro-batch 3, batch 1, tick 1)", "in forward"
    raise ValueError(what)


@pytest.mark.parametrize("what", ["forward", "replay", "backward", "loss", "optimizer", "evaluation", "micro-batch"])
def test_a_stage_that_raises_is_told_with_op_batch_and_traceback(what: str) -> None:
    chain, begins, shows = failing(what)
    with pytest.raises(StageFailed) as caught:
        run_here(chain.plan(), chain.engines)
    message = str(caught.value)
    assert message.startswith(f'{begins}: KeyError: "the culprit\'s own words"\n')
    assert "Traceback (most recent call last)" in message
    assert shows in message
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_usage_error_in_a_stage_goes_through_as_it_is() -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        raise UsageError("the labels are in feet")

    chain = Chain(seeded(lambda: [nn.Linear(4, 4) for _ in range(2)]), BP(), vectors(2), loss=loss)
    with pytest.raises(UsageError, match=r"^the labels are in feet$"):
        run_here(chain.plan(), chain.engines)


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
