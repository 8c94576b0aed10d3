"""Emulated stages and stragglers: they wait where they should, and leave everything else alone."""

from __future__ import annotations

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
from delock.methods import DGL, FDG, GPipe, Interlocking, Method
from delock.nets import emulated
from delock.nets.emulated import Emulated
from delock.options import Simulation
from delock.plan import unroll
from delock.stage import Stage
from delock.timeline import Emulation, Slowdown, straggler

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


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:1", "0:0", "-1:2"])
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
