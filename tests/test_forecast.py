"""The forecast of `delock plan`: staleness of every part, latency of links, stable steps, and figures of our own runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from delock.cli import main
from delock.cli.forecast import written
from delock.cli.measured import FIGURES, UNITS, Figure
from delock.methods import DDG, FDG, METHODS, make, spelled
from delock.timeline import Costs, longest_step, predict

from timings import linked

pytestmark = pytest.mark.usefixtures("own_random")

RUNS = Path(__file__).resolve().parent.parent / "benchmarks" / "quality" / "runs"


def values(words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The values that `delock plan WORDS --json` prints."""
    assert main(["plan", *words.split(), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def lines(words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that `delock plan WORDS` prints."""
    assert main(["plan", *words.split()]) == 0
    return capsys.readouterr().out.splitlines()


# -- staleness of every part


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--method ddg --micro-batches 4", [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
        ("--method fdg --micro-batches 4", [[2, 2, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]),
        ("--method 2bw", [[1, 1, 1, 1]] * 4),
        ("--method adl --accumulate 2", [[3, 3], [2, 2], [1, 1], [0, 0]]),
        ("--method ddg", [[3], [2], [1], [0]]),
    ],
)
def test_staleness_of_parts(words: str, parts: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    stages = values(f"--stages 4 {words}", capsys)["stages"]
    assert [stage["staleness_per_part"] for stage in stages] == parts
    assert [stage["staleness"] for stage in stages] == [fmean(part) for part in parts]


def test_the_column_of_parts(capsys: pytest.CaptureFixture[str]) -> None:
    """It is there where the parts of a group differ."""
    told = lines("--method ddg --micro-batches 4 --stages 4", capsys)
    assert any(re.fullmatch(r"0 +0\.75 +1 1 1 0 +3 .*", line) for line in told)
    assert not any("of each" in line for line in lines("--method ddg --stages 4", capsys))
    assert written([1] * 12 + [0] * 4) == "12 x 1, 4 x 0"


# -- latency


def test_the_latency_of_parts_in_numbers() -> None:
    for method, periods in ((DDG, [3.25, 4.0, 5.0]), (FDG, [3.0, 3.0, 3.3])):
        for M, period in zip((1, 4, 8), periods, strict=True):
            one = Costs(forward=(1 / M,) * 2, backward=(2 / M,) * 2, up=(0.25,), down=(0.25,))
            assert predict(method(micro_batches=M), 2, one).period == pytest.approx(period, abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_who_is_warned_of_latency(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The methods whose errors have lags and whose activations have none; beyond a twentieth of a batch."""
    warned = method in ("ddg", "pipedream", "2bw", "paci")
    for delay, M in ((0.25, make(method).fitted(2).micro_batches), (0.001, 1)):
        found = values(f"--method {method} --stages 2 --link-delay {delay}", capsys)["latency"]
        assert (found is not None) == (warned and delay > 0.1)
        if found:
            assert found["share"] == pytest.approx(M * delay / found["period"])
            assert found["with_fdg"] < found["period"] > found["without_delay"] == pytest.approx(3)
    assert values(f"--method {method} --stages 2", capsys)["latency"] is None


def test_a_delay_that_something_hides_is_no_matter(capsys: pytest.CaptureFixture[str]) -> None:
    """Features replay recomputes while the error is under way."""
    assert values("--method fr --stages 2 --link-delay 0.25", capsys)["latency"] is None
    assert predict(make("fr"), 2, linked(2, 0.25)).period == predict(make("fr"), 2, linked(2, 0.0)).period


def test_the_sentence_about_latency(capsys: pytest.CaptureFixture[str]) -> None:
    told = lines("--method ddg --micro-batches 4 --stages 2 --link-delay 0.25", capsys)
    [line] = [line for line in told if line.startswith("latency")]
    assert "4 parts x a link delay of 0.25 are 25 % of a batch: it takes 4, without delay 3; fdg" in line


# -- stable steps


def test_stable_steps(capsys: pytest.CaptureFixture[str]) -> None:
    adamw = "--method ddg --micro-batches 4 --stages 4 --optimizer adamw"
    plain, spike = (values(f"{adamw} --beta1 0.9{more}", capsys)["stability"] for more in ("", " --correct spike"))
    assert (plain["stage"], plain["staleness"], plain["spike"], spike["spike"]) == (0, 0.75, False, True)
    assert f"{plain['step']:.2f} {plain['other']:.1f} {plain['without_delay']:.0f}" == "1.33 4.5 38"
    assert (spike["step"], spike["other"]) == (plain["other"], plain["step"])
    assert values(f"{adamw} --correct spike", capsys)["stability"]["beta1"] == 0.95
    farther = f"{adamw} --correct spike --horizon 3"
    assert values(farther, capsys)["stability"]["step"] == longest_step({0: 0.25, 1: 0.75}, 0.95, 3 * 0.75)
    assert any(line.startswith("adamw with spike, horizon 3, beta1 0.95") for line in lines(farther, capsys))
    [line] = [line for line in lines(f"{adamw} --correct ahead", capsys) if line.startswith("adamw")]
    assert "stable up to 1.33, 3.5 % of the 38 without delay; with spike 4.47 (ahead not counted)" in line


def test_replay_counts_from_its_forwards(capsys: pytest.CaptureFixture[str]) -> None:
    found = values("--method fr --stages 4 --optimizer adam", capsys)["stability"]
    assert (found["staleness"], found["step"]) == (3.0, longest_step({3: 1.0}, 0.9))


@pytest.mark.parametrize("words", ["--method ddg --optimizer sgd", "--method ddg --optimizer muon", "--method 1f1b --optimizer adamw"])
def test_no_steps_are_told(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert values(f"{words} --stages 2", capsys)["stability"] is None
    assert not any("stable" in line for line in lines(f"{words} --stages 2", capsys))


# -- figures of our own runs


def scores(of: str, record: str) -> list[float]:
    """The scores of a record with every seed there is."""
    return [json.loads(path.read_text())["score"] for path in sorted((RUNS / of).glob(f"{record}-seed*.json"))]


def rates(of: str, record: str) -> dict[float, float]:
    """The scores of a row with seed 0 by its rates; a run that diverged is infinitely bad."""
    row = record.rsplit("-lr", 1)[0]
    found = {}
    for path in (RUNS / of).glob(f"{row}-lr*-seed0.json"):
        said = json.loads(path.read_text())
        found[said["settings"]["lr"]] = float("inf") if said["score"] is None else said["score"]
    return dict(sorted(found.items()))


@pytest.mark.parametrize("one", FIGURES, ids=lambda one: one.record)
def test_figures_are_those_of_the_records(one: Figure) -> None:
    own, beside = scores(one.of, one.record), scores(one.of, one.beside)
    digits = 3 if "bits" in one.unit else 2
    assert one.lost == round(fmean(own) - fmean(beside), digits)
    for record in (one.record, one.beside):
        tried = rates(one.of, record)
        best = min(tried, key=lambda rate: tried[rate])
        assert f"{record}-seed".startswith(f"{record.rsplit('-lr', 1)[0]}-lr{best:g}-seed"), "another rate is better"
        assert best not in (min(tried), max(tried)), "the best rate lies at the edge of its grid"


@pytest.mark.parametrize("one", FIGURES, ids=lambda one: one.record)
def test_figures_are_of_the_run_they_name(one: Figure) -> None:
    said = json.loads((RUNS / one.of / f"{one.record}-seed0.json").read_text())["settings"]
    assert spelled(make(said["method"], **said["options"]).fitted(one.K)) == one.method
    assert said["K"] == one.K
    name, feedback = said["optimizer"]["name"].lower(), said["optimizer"]["feedback"]
    assert name == {"adamw": "scadamw", "sgd": "scsgd"}[one.optimizer] if "spike" in one.correct else one.optimizer
    assert feedback == ("feedback" in one.correct)
    assert said["optimizer"].get("r") == one.horizon
    assert {key: said["optimizer"][key] for key in one.held} == {key: list(v) if isinstance(v, tuple) else v for key, v in one.held.items()}
    assert set(one.correct) <= {"spike", "feedback"}  # ahead is an option of the method
    assert one.of in UNITS


def test_a_figure_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    one = FIGURES[0]
    assert one.method == "ddg(micro_batches=4)"
    words = f"--method ddg --micro-batches 4 --stages {one.K} --optimizer {one.optimizer}"
    assert values(words, capsys)["measured"]["record"] == one.record
    assert any(
        one.path in line and f"{one.lost:.3g} {one.unit}" in line and "muon (momentum 0.95)" in line for line in lines(words, capsys)
    )
    adamw = "--method ddg --micro-batches 4 --stages 4 --optimizer adamw --correct spike"
    assert any("adamw (betas 0.95 0.99) with spike (horizon 2)" in line for line in lines(adamw, capsys))
    assert values(words.replace(f"--stages {one.K}", "--stages 3"), capsys)["measured"] is None
