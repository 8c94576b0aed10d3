"""Emulated stages and stragglers: they wait where they should, and leave everything else alone."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from delock.api import fit
from delock.cli import main
from delock.engine.engine import Engine
from delock.engine.feed import Feed
from delock.errors import UsageError
from delock.links.mailbox import Mailbox
from delock.methods import ADL, DGL, FDG, ZB1P, GPipe, Interlocking, Method, PipeDream2BW
from delock.nets import emulated
from delock.nets.emulated import Emulated
from delock.options import Simulation
from delock.partition.layers import layers
from delock.partition.measure import measure
from delock.plan import unroll
from delock.stage import Stage
from delock.timeline import Costs, Emulation, Slowdown, straggler

from workloads import Samples, sgd

pytestmark = pytest.mark.usefixtures("own_random")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of emulated stages, which take no time here."""
    told: list[float] = []
    monkeypatch.setattr(emulated.time, "sleep", told.append)
    return told


def test_where_an_emulated_stage_waits(waits: list[float]) -> None:
    stage = Emulated((4, 5), forward=1.0, backward=2.0)
    x = torch.ones(3, 7, requires_grad=True)
    out = stage(x)
    assert out.shape == (3, 4, 5)
    torch.autograd.grad(out, [x, stage.weight], torch.ones_like(out), retain_graph=True)
    assert waits == [1.0, 1.0, 1.0]  # forward, input gradient, weight gradient
    del waits[:]
    torch.autograd.grad(stage(x), [stage.weight], torch.ones_like(out))
    assert waits == [1.0, 2.0]  # nobody asks for the input's: the weight gradient of a real stage of many layers still needs most of it
    del waits[:]
    stage.eval()(x)
    assert waits == []


def test_jitter_stays_within_its_share_and_is_repeated(waits: list[float]) -> None:
    for _ in range(2):
        stage = Emulated((1,), 1.0, 1.0, jitter=0.25, seed=3)
        for _ in range(50):
            stage(torch.ones(1, 1))
    assert waits[:50] == waits[50:]
    assert 0.75 <= min(waits) < 0.9 < 1.1 < max(waits) <= 1.25


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("method", [FDG(), GPipe(2), DGL(), Interlocking(2)], ids=str)
def test_a_run_waits_as_long_as_it_says(waits: list[float], method: Method) -> None:
    data = Samples("image", 32, 8, torch.float32)
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Sequential(nn.Flatten(), nn.Linear(80, 10))]
    before = [p.clone() for layer in layers for p in layer.parameters()]
    fit(layers, data, loss=cross_entropy, method=method, optimizer=sgd, batches=4, workers="inline",
        simulation=Simulation(emulate=Emulation(1.0, 2.0)))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, (p for layer in layers for p in layer.parameters()), strict=True))
    passed_on = 4 * 1.0 * isinstance(method, Interlocking)  # stage 1 passes on the error of its own loss: half a backward per batch
    assert sum(waits) == pytest.approx(3 * 4 * (1.0 + 2.0) + passed_on)


@pytest.mark.parametrize("method", [ZB1P(2), Interlocking(2), Interlocking(3, combine="sum"), ADL(2), PipeDream2BW(4)], ids=str)
def test_emulated_stages_wait_for_what_the_simulator_charges(waits: list[float], method: Method) -> None:
    """Stage 0 too, whose Backward has no half for its input, and updates."""
    data = Samples("image", 32, 8, torch.float32)
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Sequential(nn.Flatten(), nn.Linear(80, 10))]
    given = Simulation(emulate=Emulation(1.0, 2.0, update=0.25))
    result = fit(layers, data, loss=cross_entropy, method=method, optimizer=sgd, batches=4, workers="inline", simulation=given)
    M = method.micro_batches
    costs = Costs(forward=(1 / M,) * 3, backward=(2 / M,) * 3, update=(0.25,) * 3)
    plan = unroll(method, 3, 4)
    charged = [sum(costs.work(k, step.op, replayed=False)) for k, column in enumerate(plan.columns) for step in column]
    assert sum(waits) == pytest.approx(sum(charged))
    inline = 3 * (3.0 + 0.25 / method.batches_per_update)  # one after another
    assert result.started.samples_per_second == pytest.approx(8 / inline)


class Asked(torch.autograd.Function):
    """Notes whether its input's gradient is asked for."""

    notes: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        Asked.notes.append(ctx.needs_input_grad[0])
        return (d * ctx.saved_tensors[0] if ctx.needs_input_grad[0] else None), d.sum()


class Asking(nn.Module):
    """Multiplies by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = Asked.apply(x, self.weight)
        return made


@pytest.mark.parametrize("method", [ZB1P(2), Interlocking(2, send="early")], ids=str)
def test_the_first_layer_is_measured_as_it_trains(method: Method) -> None:
    """Without a gradient of its input, which the Backward of stage 0 does not compute either."""
    data = Samples("image", 16, 8, torch.float32)
    net = [Asking(), nn.Sequential(nn.Flatten(), nn.Linear(192, 10))]
    inputs, targets = next(iter(data.epoch(0)))
    del Asked.notes[:]
    measure(layers(net), inputs, targets, cross_entropy)
    fit(net, data, loss=cross_entropy, method=method, optimizer=sgd, batches=2, workers="inline")
    assert Asked.notes
    assert not any(Asked.notes)


@pytest.mark.usefixtures("own_random")
def test_a_straggler_is_slow_in_the_ticks_of_the_simulator() -> None:
    data = Samples("image", 40, 8, torch.float32)
    slow, lingered = Slowdown(0.5, probability=0.5, seed=4), list[float]()
    stage = Stage(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), 0, 1, optimizer=sgd, loss=cross_entropy)
    engine = Engine(stage, Mailbox().end(0), feed=Feed(data, None, 1, torch.device("cpu")), slow=slow, delay=lingered.append)
    expected = 0
    for step in unroll(FDG(), 1, 5).columns[0]:
        before = len(lingered)
        engine.execute(step)
        expected += (len(lingered) > before) != (slow.extra(step.tick, 0) > 0) and "Update" not in str(step.op)
    assert expected == 0
    assert lingered


def test_emulation_as_text() -> None:
    assert Emulation.parse("320:640") == Emulation(0.32, 0.64)
    assert Emulation.parse("320:640:0.1:25") == Emulation(0.32, 0.64, jitter=0.1, update=0.025)


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:1", "0:0", "-1:2", "1:2:0:", "1:2:0:1:1"])
def test_bad_emulation(text: str) -> None:
    with pytest.raises(UsageError, match="must be F:B"):
        Emulation.parse(text)


@pytest.mark.parametrize("text", ["", "0.5", "x:1", "3:1", "1:-1"])
def test_bad_straggler(text: str) -> None:
    with pytest.raises(UsageError, match="slow is"):
        straggler(text, 3, 0)


@pytest.mark.usefixtures("own_random")
def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--slow", "2:1", "--workers", "inline", "--batches", "2"]) == 2
    assert "the stages are 0 .. 1" in capsys.readouterr().err
    assert main(["train", "--emulate", "fast", "--workers", "inline", "--batches", "2"]) == 2
    assert "must be F:B" in capsys.readouterr().err
