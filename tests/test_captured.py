"""Captured ticks: on static memory the numbers of the plain engine, no slot used again too early, no race between stages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import delock
from delock.engine.graphs.period import Period, find_period, period_of
from delock.engine.graphs.sgd import capturable
from delock.engine.graphs.static_messages import StaticMessages
from delock.engine.graphs.static_stage import StaticStage
from delock.engine.graphs.streams import SerialStreams
from delock.engine.graphs.ticks import Ticks
from delock.errors import NonFinite, UsageError
from delock.links.message import Message
from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, AsyncDGL, GPipe, Interlocking, Method
from delock.options import Compression, Execution, Report
from delock.plan import unroll
from delock.run.checks import refuse_uncapturable
from delock.run.inline import run_inline
from delock.run.job import StageJob, StageResult
from delock.run.request import Request

from harness import CPU, assert_equal, enough, inline, jobs, plainly
from workloads import Samples, class_loss, mlp, sgd, warm_up

METHODS: list[Method] = [
    BP(),
    DDG(),
    FR(),
    FDG(beta=0.5),
    FDG(at="mixed"),
    ADL(accumulate=2),
    ADL(accumulate=4, reduce="sum", at="mixed"),
    DSP(p=2, q=1),
    DGL(),
]


def dyadic(params: Any, momentum: float = 0.9, nesterov: bool = False) -> torch.optim.SGD:
    """With `halving`, rates are powers of two: lr times a gradient is exact, and the one rounding that could differ from torch's none."""
    return torch.optim.SGD(params, lr=2**-5, momentum=momentum, weight_decay=2**-8, nesterov=nesterov)


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """1, 1/2, 1/4, each for three updates, again and again."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 2.0 ** -(n // 3 % 3))


def made(work: str, K: int, method: Method, **options: Any) -> list[StageJob]:
    """Jobs without dropout and without a smaller last batch."""
    chosen: dict[str, Any] = {"samples": 32, "epochs": 3, "optimizer": dyadic, "schedule": halving, "window": 5} | options
    found = jobs(work, K, method, **chosen)
    for job in found:
        for module in (job.module, *([job.head] if job.head else [])):
            for dropout in (m for m in module.modules() if isinstance(m, nn.Dropout)):
                dropout.p = 0.0
    return found


CAPTURED = Execution(captured=True)


def captured(found: list[StageJob], device: torch.device = CPU) -> list[StageResult]:
    return run_inline([replace(job, execution=replace(job.execution, captured=True)) for job in found], device, lambda event: None)


# ---- the numbers -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "K"), enough(itertools.product(METHODS, (1, 2, 3, 4)), together=1), ids=str)
def test_static_memory_gives_the_same_bits(method: Method, K: int) -> None:
    """Through fill, steady state and drain, in float32, with batch norm, a schedule, evaluations and windows of five ticks."""
    ours, plain = captured(made("conv", K, method)), inline(made("conv", K, method))
    assert_equal(ours, plain)
    assert [result.report.updates for result in ours] == [result.report.updates for result in plain]


@pytest.mark.parametrize("method", [FDG(), DSP(), DGL(), ADL()], ids=str)
def test_tuples_and_weights_without_gradient(method: Method) -> None:
    """Integers travel, errors are zeros where nobody reads, the first op of a stage writes in place."""
    assert_equal(captured(made("tuple", 3, method)), inline(made("tuple", 3, method)))


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"nesterov": True}], ids=str)
def test_forms_of_sgd(options: dict[str, Any]) -> None:
    made_so = partial(made, "conv", 3, FDG(), optimizer=partial(dyadic, **options))
    assert_equal(captured(made_so()), inline(made_so()))


def test_clipping() -> None:
    def clipped() -> list[StageJob]:
        return [replace(job, length=replace(job.length, clip=0.05)) for job in made("conv", 3, FDG())]

    assert_equal(captured(clipped()), inline(clipped()))
    assert captured(clipped())[0].state["0.0.weight"].ne(captured(made("conv", 3, FDG()))[0].state["0.0.weight"]).any()


def test_any_rate_to_rounding() -> None:
    """lr times the direction is rounded before it is subtracted, where torch's SGD may not: in double precision that shows at 1e-15."""
    found = partial(made, "conv", 3, FDG(), dtype=torch.float64, optimizer=sgd, schedule=warm_up)
    for ours, plain in zip(captured(found()), inline(found()), strict=True):
        torch.testing.assert_close(ours.state, plain.state, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-11, atol=0)


def test_a_run_shorter_than_its_own_filling() -> None:
    found = partial(made, "conv", 4, FDG(), samples=16, epochs=1)
    assert_equal(captured(found()), inline(found()))


def test_losses_are_looked_at_every_few_batches() -> None:
    seen: list[Any] = []
    found = [replace(job, report=Report(log_every=5), execution=CAPTURED) for job in made("conv", 2, FDG(), evaluate=False)]
    results = run_inline(found, CPU, seen.append)
    assert results[-1].losses == inline(made("conv", 2, FDG(), evaluate=False))[-1].losses
    assert [event.batches for event in seen if hasattr(event, "loss")] == [5, 10, 12]
    assert results[-1].seconds > 0
    assert results[0].report.updates == 12


# ---- the memory ------------------------------------------------------------------------------------------------------------------------


SLOTS = [(BP(), 1), (DGL(), 2), (DDG(), 4), (FR(), 4), (FDG(), 7), (ADL(2), 8), (DSP(2, 1), 10)]


@pytest.mark.parametrize(("method", "slots"), SLOTS, ids=str)
def test_slots_of_four_stages(method: Method, slots: int) -> None:
    found = find_period(method, 4)
    assert (found.slots, len(found.ticks), len(found.warm_up_passes)) == (slots, slots, slots)
    assert found.two_phases == (method.name in ("ddg", "fdg", "adl"))


def with_slots(method: Method, K: int, slots: int) -> Period:
    """The cycle of a method with another number of slots than it needs."""
    return period_of(unroll(method, K, 60), slots, 1, method.span(K))


@pytest.mark.parametrize(
    "method",
    [FR(), pytest.param(FDG(), marks=pytest.mark.slow), FDG(at="mixed"), DSP(), pytest.param(DGL(), marks=pytest.mark.slow)],
    ids=str,
)
def test_one_slot_less_is_noticed(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    K, plain = 3, inline(made("conv", 3, method))
    needed = find_period(method, K).slots
    for slots, equal in ((needed, True), (needed + 1, True), (needed - 1, False)):
        monkeypatch.setattr("delock.run.inline.find_period", lambda *_, slots=slots: with_slots(method, K, slots))
        ours = captured(made("conv", K, method))
        same = all(torch.equal(value, plain[k].state[name]) for k in range(K) for name, value in ours[k].state.items())
        assert same == equal, f"{slots} slots"


class Watched(SerialStreams):
    """Streams with vector clocks: of two uses of a slot by different stages, one of them writing, one must be known to come first."""

    def __init__(self, K: int) -> None:
        self.stream, self.units = 0, 0
        self.clocks = [[0] * K for _ in range(K)]
        self.used: dict[tuple[int, int], list[tuple[int, int, bool]]] = {}  # (buffer, slot) -> stream, its time, writes
        self.races: list[str] = []

    @contextmanager
    def on(self, k: int) -> Iterator[None]:
        self.stream = k
        self.clocks[k][k] += 1
        yield

    def mark(self, k: int) -> list[int]:  # type: ignore[override]
        return list(self.clocks[k])

    def wait(self, k: int, mark: list[int]) -> None:
        self.clocks[k] = [max(own, other) for own, other in zip(self.clocks[k], mark, strict=True)]

    def run(self, work: Callable[[], None]) -> None:
        """Forked and joined: what was before is over, and what comes after comes after."""
        self.units += 1
        self.used.clear()
        work()
        self.used.clear()

    def record(self, work: Callable[[], None], apart: bool) -> Callable[[], None]:
        self.run(work)
        return lambda: self.run(work)

    def use(self, buffer: object, slot: int, writes: bool) -> None:
        here = self.used.setdefault((id(buffer), slot), [])
        for stream, time, wrote in here:
            if stream != self.stream and (writes or wrote) and self.clocks[self.stream][stream] < time:
                self.races.append(f"streams {stream} and {self.stream}, slot {slot}")
        here.append((self.stream, self.clocks[self.stream][self.stream], writes))


def watched(method: Method, K: int, monkeypatch: pytest.MonkeyPatch, slots: int | None = None) -> Watched:
    """A run in which every use of a slot is noted; a backward reads its input too, through the graph."""
    found = Watched(K)
    put, get, backward = StaticMessages.put, StaticMessages.get, StaticStage.backward

    def noted_put(self: StaticMessages, slot: int, message: Message) -> None:
        found.use(self, slot, True)
        put(self, slot, message)

    def noted_get(self: StaticMessages, slot: int) -> Message:
        found.use(self, slot, False)
        return get(self, slot)

    def noted_backward(self: StaticStage, step: Any, slot: int) -> Message | None:
        found.use(self.inputs, slot, False)
        return backward(self, step, slot)

    monkeypatch.setattr(StaticMessages, "put", noted_put)
    monkeypatch.setattr(StaticMessages, "get", noted_get)
    monkeypatch.setattr(StaticStage, "backward", noted_backward)
    monkeypatch.setattr("delock.run.inline.make_streams", lambda device, K: found)
    if slots is not None:
        monkeypatch.setattr("delock.run.inline.find_period", lambda *_: with_slots(method, K, slots))
    captured(made("conv", K, method, epochs=1))
    return found


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_stages_on_streams_do_not_race(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    found = watched(method, 3, monkeypatch)
    assert found.units > 8
    assert not found.races


@pytest.mark.parametrize(("method", "slots"), [(FDG(), 1), (DSP(), 3), (DGL(), 1)], ids=str)
def test_a_race_would_be_seen(method: Method, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so few slots that two ops of one replay meet; with one slot less than needed some are overwritten between replays only."""
    assert watched(method, 3, monkeypatch, slots).races


def test_addresses_never_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, buffers, momenta, gradients of an open group, losses and slots: after recording every one is written in place."""
    seen: list[list[int]] = []
    tick = Ticks._tick

    def noted(self: Ticks, t: int, steps: Any) -> None:
        tick(self, t, steps)
        addresses = []
        for stage in self.stages:
            held = [*stage.held, stage.loss, *stage._weights(), *stage._buffers(), *stage._momenta()]
            addresses += [t.data_ptr() for t in held if t is not None]
            for slots in (stage.inputs, stage.errors):
                addresses += [leaf.data_ptr() for leaves in slots.leaves.values() for leaf in leaves]
        seen.append(addresses)

    monkeypatch.setattr(Ticks, "_tick", noted)
    captured(made("conv", 3, ADL(2)))
    assert len(seen) > 16
    assert len(seen[0]) > 100
    assert all(addresses == seen[0] for addresses in seen)


# ---- what is refused -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [GPipe(2), BP(accumulate=2), FDG(order="backward-first"), AsyncDGL(order="round-robin"), Interlocking(n_wise=2)],
    ids=lambda method: method.name,
)
def test_methods_that_are_no_row_of_ticks(method: Method) -> None:
    with pytest.raises(UsageError, match=f"{method.name}.* cannot run as captured ticks.*use bp, ddg, fr, fdg or adl"):
        find_period(method, 3)


def refused(found: list[StageJob], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        captured(found)


def test_what_does_not_go_with_captured_ticks() -> None:
    refused(jobs("conv", 2, FDG(), samples=32), "stage 0 draws random numbers")
    refused(made("conv", 2, FDG(), samples=30), "a batch of 6 samples came after batches of 8")
    refused(made("conv", 2, FDG(), optimizer=lambda named: torch.optim.AdamW(named, 0.1)), "torch.optim.SGD without dampening, not AdamW")
    refused(made("conv", 2, ADL(2), samples=24, epochs=1, schedule=None), "2 batches an update, so 3 batches leave 1")
    with pytest.raises(UsageError, match="bp clips over the whole network"):
        find_period(BP(), 2, clip=1.0)


def test_a_loss_that_is_no_number() -> None:
    with pytest.raises(NonFinite, match="the loss of batch"):
        captured(made("mlp", 2, FDG(), optimizer=lambda named: torch.optim.SGD(named, 1e30), schedule=None))


def test_the_optimizer_keeps_its_groups() -> None:
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]

    def two(named: Any) -> torch.optim.SGD:
        first, second = named
        return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": [second], "weight_decay": 0.25}], lr=0.125)

    ours: Any = capturable(two)([("a", weights[0]), ("b", weights[1])])
    ours.upload_rates()
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    ours.step()
    assert torch.equal(weights[0], torch.full((2,), 0.5))
    assert torch.equal(weights[1], torch.full((3,), 1 - 0.125 * 1.25))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device": "cpu"}, 'captured ticks need a GPU, but device is "cpu": use device "cuda"'),
        ({"workers": "processes"}, "captured ticks run all stages in one process"),
        ({"report": Report(trace=True)}, "captured does not go with trace"),
        ({"compression": Compression("bf16")}, "captured does not go with codecs"),
        ({"train": Samples("image", 30, 8)}, "batches of one size, but here they have 8 and 6 samples"),
        ({}, ""),
    ],
    ids=plainly,
)
def test_what_is_refused_before_anything_is_measured(changed: dict[str, Any], said: str) -> None:
    options: dict[str, Any] = dict.fromkeys(("model", "train", "test", "loss", "method", "optimizer"))
    asked = Request(**options | {"device": "cuda", "workers": "inline", "train": Samples("image", 32, 8)} | changed)
    if not said:
        refuse_uncapturable(asked)
        return
    with pytest.raises(UsageError, match=said):
        refuse_uncapturable(asked)


def test_fit_on_a_cpu_says_that_it_needs_a_gpu() -> None:
    batches = [(torch.zeros(4, 12), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(UsageError, match="captured ticks need a GPU"):
        delock.fit(mlp(5), batches, loss=class_loss, optimizer=partial(torch.optim.SGD, lr=0.1), batches=1, workers="inline",
                   execution=CAPTURED)  # fmt: skip
