"""--trace: the measured timeline as Chrome reads it, as a picture, and as shares of the time."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from delock.cli import main
from delock.cli.config import TrainConfig, build, resolve
from delock.cli.summary import RunReport
from delock.cli.trace import forecast
from delock.draw import chrome
from delock.methods import BP, FDG, make
from delock.ops import Backward, Forward, Update
from delock.options import Simulation
from delock.plan import unroll
from delock.run.prepare import prepare
from delock.run.request import Request
from delock.timeline import KINDS, Costs, Slowdown, Span, Timeline, reasons, simulate, throughput

from workloads import Samples, class_loss


def test_shares_of_a_simulated_run() -> None:
    timeline = simulate(unroll(BP(), 3, 24), Costs.unit(3))
    found = reasons(timeline)
    # a batch takes 9: every stage works 3 of them; stage 0 waits for errors only, the last for activations only
    assert [share["forward"] for share in found] == pytest.approx([1 / 9] * 3)
    assert [share["backward"] for share in found] == pytest.approx([2 / 9] * 3)
    assert [share["wait: error"] for share in found] == pytest.approx([6 / 9, 3 / 9, 0])
    assert [share["wait: activation"] for share in found] == pytest.approx([0, 3 / 9, 6 / 9])
    for share in found:
        assert set(share) == set(KINDS)
        assert sum(share.values()) == pytest.approx(1)


def test_shares_of_waits_and_copies() -> None:
    """Ten seconds of which an op takes four, a quarter of them copying, after three for its input and two for room; one belongs to none."""
    column = [Span(0, Update(), 0.0, 0.0, 0, 0, 0.0)]
    for b in range(30):
        column += [Span(0, Forward(b), 10 * b + 5.0, 10 * b + 9.0, b, b, 5.0, full=2.0, copied=1.0)]
        column += [Span(0, Backward(b, 0), 10 * b + 9.0, 10 * b + 9.0, b, b, 0.0)]
        column += [Span(0, Update(), 10 * b + 10.0, 10 * b + 10.0, b, b, 0.0)]
    shares = reasons(Timeline((tuple(column),)))[0]
    found = {kind: round(share, 9) for kind, share in shares.items() if share > 1e-9}
    assert found == {"forward": 0.3, "copy": 0.1, "wait: slot": 0.2, "wait: activation": 0.3, "between ops": 0.1}


def test_trace_events(tmp_path: Path) -> None:
    timeline = simulate(unroll(FDG(), 3, 9), Costs.unit(3))
    events = json.loads(chrome(timeline, tmp_path / "t.json").read_text())["traceEvents"]
    boxes = [event for event in events if event["ph"] == "X"]
    for k, column in enumerate(timeline.columns):
        own = [event for event in boxes if event["tid"] == k and event["name"] != "wait"]
        assert [event["ts"] / 1e6 for event in own] == pytest.approx([span.start for span in column])
        assert [event["dur"] / 1e6 for event in own] == pytest.approx([span.end - span.start for span in column])
        waits = sum(event["dur"] for event in boxes if event["tid"] == k and event["name"] == "wait")
        assert waits / 1e6 == pytest.approx(sum(span.waited for span in column))


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(("method", "slow"), [("dgl", Slowdown(2.0, victim=1)), ("dgl", None), ("fdg", Slowdown(3.0, victim=0))], ids=str)
def test_the_picture_forecasts_what_the_table_says(method: str, slow: Slowdown | None) -> None:
    """Heads and stragglers are in both."""
    stages = [nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(2)] + [nn.Linear(12, 10)]
    heads = [nn.Sequential(nn.Linear(12, 400), nn.Linear(400, 10)) for _ in range(2)] if method == "dgl" else None
    data = Samples("vector", 32, 8, torch.float32)
    request = Request(stages, data, None, class_loss, make(method), partial(torch.optim.SGD, lr=0.1), batches=400, heads=heads,
                      simulation=Simulation(slow=slow))  # fmt: skip
    started = prepare(request).started()
    assert [stage.head > 0 for stage in started.stages] == [method == "dgl", method == "dgl", False]
    drawn = forecast(RunReport(resolve(build(TrainConfig, {"method": method, "stages": 3}, "test"))), started)
    assert 8 * throughput(drawn) == pytest.approx(started.samples_per_second, rel=0.02)


@pytest.mark.usefixtures("own_random")
def test_a_traced_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--model", "mlp", "--batches", "30", "--stages", "2", "--workers", "inline", "--trace", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "ms per update" in shown
    assert "ui.perfetto.dev" in shown
    events = json.loads((out / "timeline.json").read_text())["traceEvents"]
    assert sum(event["name"] == "U" for event in events) == 2 * 30
    assert (out / "timeline.png").stat().st_size > 1000
