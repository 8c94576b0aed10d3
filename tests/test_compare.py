"""`delock compare` and `delock plan`: what a row may say, what a comparison leaves behind, what a plan shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import delock.api
from delock.cli import main
from delock.cli.config import CompareConfig, build, flat
from delock.cli.rows import rows, usable_cores
from delock.errors import UsageError
from delock.methods import METHODS, make

import papers

pytestmark = pytest.mark.usefixtures("own_random")

SMALL = ["--model", "mlp", "--workers", "inline", "--limit", "128", "--batch-size", "32", "--test-batch-size", "512"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*methods: str, **options: Any) -> list[str]:
    return [row.name for row in rows(build(CompareConfig, {"methods": list(methods), **options}, "test"))]


def test_rows_are_methods_with_options_of_their_own() -> None:
    assert names("bp,ddg, fr", "fdg") == ["plain", "bp", "ddg", "fr", "fdg"]
    assert names("bp", plain=False) == ["bp"]
    words = ["adl:accumulate=4:lr=0.4:nesterov=true:schedule=steps:milestones=1+2.5", "dsp:p=2+1+3:q=2", "fdg:beta=0.5:at=mixed"]
    found = rows(build(CompareConfig, {"methods": words, "stages": 4, "threads": 2, "epochs": 3, "lr": 0.1}, "test"))
    plain, adl, dsp, fdg = [flat(row.config) for row in found]
    assert (plain["method"], plain["stages"], plain["threads"], plain["lr"]) == ("bp", 1, min(8, max(2, usable_cores())), 0.1)
    assert (adl["accumulate"], adl["lr"], adl["nesterov"], adl["milestones"]) == (4, 0.4, True, (1.0, 2.5))
    assert (dsp["p"], dsp["q"], dsp["lr"]) == ((2, 1, 3), (2,), 0.1)
    assert (fdg["beta"], fdg["at"]) == (0.5, "mixed")
    assert {row.config.training.epochs for row in found} == {3}
    assert len({row.folder for row in found}) == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fdg:bta=1", "'beta'"),
        ("fdg:beta=x", "beta is 'x'"),
        ("bp:beta=0.5", "bp has no option 'beta'"),
        ("fdg:epochs=3", "is the same for all rows"),
        ("fdg:batch-size=3", "is the same for all rows"),
        ("fdg:lr=0.1:optimizer=adm", "'adam'"),
        ("dsp:p=1+2", "link"),
        ("gpipe:micro_batches=65", "65 parts"),
        ("bp,bp", "twice"),
        ("fdg:lr=0.1:beta=0.5:lr=0.2", "fdg:lr=0.1:beta=0.5:lr=0.2: lr is given twice"),
        ("plain", "--no-plain"),
        (",", "nothing to compare"),
        (":lr=0.2", "the row ':lr=0.2' names no method"),
    ],
)
def test_rows_that_are_refused(words: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        names(words, stages=2)


@pytest.mark.usefixtures("own_random")
def test_a_comparison_has_a_table_a_file_and_figures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--methods", "bp,fdg:beta=0.5,bp:lr=1e30", "--epochs", "1", "--model", "cnn", "--limit", "64"]
    assert main(["compare", *SMALL, *words, "--out", "c"]) == 1  # the last row learns too fast
    heard = capsys.readouterr()
    assert "error: bp:lr=1e30: the loss of batch 1 became" in heard.err
    told = json.loads(Path("c/compare.json").read_text())
    assert [row["name"] for row in told["rows"]] == ["plain", "bp", "fdg:beta=0.5", "bp:lr=1e30"]
    plain, bp, fdg, failed = told["rows"]
    assert failed["summary"]["status"] == "failed"
    assert plain["summary"]["test_accuracy"] == bp["summary"]["test_accuracy"]
    assert (plain["speedup_over_plain"], bp["speedup_over_bp"]) == (1.0, 1.0)
    assert fdg["speedup_over_bp"] == pytest.approx(fdg["summary"]["samples_per_second"] / bp["summary"]["samples_per_second"])
    assert bp["summary"]["cuts"] == fdg["summary"]["cuts"] == told["cuts"]
    assert plain["summary"]["cuts"] == []
    assert {path.name for path in Path("c").iterdir()} == {
        *("compare.json", "compare.md", "compare.png", "compare.svg"),
        *("plain", "bp", "fdg-beta=0.5"),
    }
    table = Path("c/compare.md").read_text().splitlines()
    assert len(table) == 6
    assert table[0].startswith("| method | test accuracy |")
    assert len({text.count("|") for text in table}) == 1
    assert "fdg:beta=0.5" in heard.out
    assert main(["train", "--config", "c/fdg-beta=0.5/config.toml", "--out", "again"]) == 0
    once, again = load_file("c/fdg-beta=0.5/model.safetensors"), load_file("again/model.safetensors")
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.usefixtures("own_random")
def test_a_speed_up_is_over_backpropagation_that_is_not_late(here: Path) -> None:
    assert main(["compare", "--methods", "bp:behind=1", "bp", *SMALL, "--batches", "1", "--no-plain", "--out", "a"]) == 0
    late, exact = (row["speedup_over_bp"] for row in json.loads(Path("a/compare.json").read_text())["rows"])
    assert late != exact == 1


@pytest.mark.parametrize(("words", "message"), [("ddg:clip=0", "clip is 0"), ("dgl:error_codec=int8", "dgl sends no errors down")])
def test_a_row_that_cannot_be_trained_ends_a_comparison_before_it_begins(
    here: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--methods", "bp", words, *SMALL, "--batches", "1", "--no-plain", "--out", "a"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("a").exists()


def test_a_comparison_in_place_of_another(here: Path) -> None:
    run = ["compare", *SMALL, "--batches", "1", "--out", "c"]
    assert main([*run, "--methods", "bp,ddg", "--no-plain"]) == 0
    assert main([*run, "--methods", "fdg", "--no-plain"]) == 2
    assert main([*run, "--methods", "fdg", "--no-plain", "--overwrite"]) == 0
    assert {path.name for path in Path("c").iterdir() if path.is_dir()} == {"fdg"}


@pytest.mark.usefixtures("own_random")
def test_a_plan_shows_chart_staleness_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--method", "adl", "--accumulate", "2", "--stages", "3", "--slots", "10"]) == 0
    out = capsys.readouterr().out
    assert "stage 0 |F0.0 F1.0 F2.0 F3.0 F4.0 B0.0 F5.0 B1.0 F6.1 B2.1" in out
    assert "throughput over bp in 3 stages" in out
    assert "3.00 with dataflow" in out


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("method", METHODS)
def test_a_plan_as_json(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--method", method, "--stages", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [stage["layer_staleness"] for stage in told["stages"]] == papers.delays(make(method), 3)
    assert len(told["chart"]) == 3
    assert told["speedup_over_bp"]["dataflow"] > 0.99


@pytest.mark.usefixtures("own_random")
def test_a_plan_from_measured_costs_with_a_picture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--profile", "mlp", "--data", "synthetic", "--image-size", "8", "--batch-size", "8"]
    assert main(["plan", *words, "--stages", "2", "--picture", "p.svg", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["profile"]["cuts"]) == 1
    assert sum(told["profile"]["layers"]) == 5
    assert told["samples_per_second"] == pytest.approx(8 / told["seconds_per_batch"])
    assert {path.name for path in here.iterdir()} == {"p.png", "p.svg"}


@pytest.mark.usefixtures("own_random")
def test_an_interrupted_comparison_keeps_its_rows(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole, calls = delock.api.fit, []

    def fit(*args: Any, **options: Any) -> Any:
        calls.append(options["method"].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr("delock.api.fit", fit)
    assert main(["compare", *SMALL, "--batches", "1", "--methods", "bp,ddg,fdg", "--no-plain", "--out", "c"]) == 130
    assert calls == ["bp", "ddg"]
    told = json.loads(Path("c/compare.json").read_text())
    assert [row["summary"]["status"] for row in told["rows"]] == ["finished", "interrupted"]
    assert "interrupted" in capsys.readouterr().err
