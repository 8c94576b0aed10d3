"""The command line: what is refused and how, what a run leaves behind, and how it ends early."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from delock.cli import main
from delock.cli.run_folder import dumps, line
from delock.errors import StageFailed, UsageError
from delock.nets import build as build_model
from delock.records import EvaluationRecord, Started, StepRecord

pytestmark = pytest.mark.usefixtures("own_random")

SMALL = ["--model", "mlp", "--workers", "inline", "--limit", "128", "--batch-size", "32", "--test-batch-size", "512"]
HEAVY = (
    "torch",
    "rich",
    "torch._dynamo",
    "torch.utils.flop_counter",
    "sympy",
    "sklearn",
    "scipy",
    "torchvision",
    "matplotlib",
    "tensorboard",
)
PRINT_MODULES = """
import sys; from delock.cli import main
code = main({!r})
print([module for module in {heavy} if module in sys.modules])
sys.exit(code)
"""


def alone(*words: str, modules: bool = False) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; with `modules`, its last line says which heavy modules it has loaded."""
    start = ["-c", PRINT_MODULES.format(list(words), heavy=HEAVY)] if modules else ["-m", "delock", *words]
    return subprocess.run([sys.executable, *start], capture_output=True, text=True, timeout=120)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# -- what is said without a run


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in ("train", "compare", "plan", "replay", "sample", "checkpoints", "export", "eval"))
    assert "examples:" in out


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("command", ["train", "compare", "plan", "replay", "sample", "checkpoints", "export", "eval"])
def test_every_command_shows_its_options_and_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert f"  delock {command}" in out
    assert "None" not in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("delock ")


def test_nothing_heavy_is_loaded_for_help_and_plans() -> None:
    assert alone(modules=True).stdout.splitlines()[-1] == "[]"
    told = alone("plan", "--json", modules=True)
    assert told.returncode == 0
    assert told.stdout.splitlines()[-1] == "[]"
    assert alone("plan", "--method", "dsp", modules=True).stdout.splitlines()[-1] == "['rich']"


def test_a_run_in_processes_loads_torch_and_what_it_shows_here_nothing_else_heavy(here: Path) -> None:
    """Each of these takes a tenth of a second to two; an optimizer, which loads torch's compiler, is built by the stages alone."""
    done = alone("train", "--model", "mlp", "--epochs", "1", "--limit", "64", "--cuts", "2", modules=True)
    assert done.stdout.splitlines()[-1] == "['torch', 'rich']", done.stderr


# -- bad input: one line, exit code 2, nothing written


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], ["'trian'", "'train'"]),
        (["train", "--method", "fgd"], ["'fgd'", "'fdg'"]),
        (["train", "--method", "ddg", "--beta", "0.5"], ["ddg", "'beta'"]),
        (["train", "--method", "fdg", "--beta", "1.5"], ["beta is 1.5"]),
        (["train", "--data", "folder"], ["--data-dir"]),
        (["train", "--data", "folder", "--data-dir", "nowhere"], ["nowhere"]),
        (["train", "--data", "digit", *SMALL], ["'digit'", "'digits'"]),
        (["train", *SMALL, "--model", "resnet21"], ["'resnet21'", "resnet20"]),
        (["train", *SMALL, "--stages", "99"], ["99", "5"]),
        (["train", *SMALL, "--cuts", "3", "1"], ["out of order"]),
        (["train", *SMALL, "--cuts", "hiden2"], ["'hiden2'", "'hidden2'"]),
        (["train", *SMALL, "--model", "cnn", "--batch-size", "1"], ["BatchNorm"]),
        (["train", "--config", "none.toml"], ["none.toml"]),
        (["compare", "--methods", "bp,fgd"], ["'fgd'", "'fdg'"]),
        (["compare", "--methods", "bp:lr"], ["'lr'", "key=value"]),
        (["compare", *SMALL, "--methods", "bp", "--stages", "99"], ["99"]),
        (["plan", "--method", "dsp", "--p", "1", "2"], ["2 lags", "1 link"]),
        (["plan", "--stages", "0"], ["stages is 0"]),
        (["plan", "--profile", "resnet21"], ["'resnet21'"]),
    ],
)
def test_bad_input_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: list[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert all(word in error for word in expected), error
    assert not list(here.iterdir())


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--acumulate", "2"], "there is no option --acumulate: did you mean --accumulate?"),
        (["train", "--no-pinn"], "there is no option --no-pinn: did you mean --no-pin?"),
        (["train", "--xyz"], "there is no option --xyz; delock train --help lists them"),
        (["train", "-e", "3"], "there is no option -e"),
        (["train", "fdg"], "'fdg' belongs to no option"),
        (["train", "--lr", "fast"], "--lr is 'fast', but it must be a number"),
        (["train", "--lr=fast"], "--lr is 'fast', but it must be a number"),
        (["train", "--stages", "1.5"], "--stages is '1.5', but it must be a whole number"),
        (["train", "--at", "stsh"], "--at is 'stsh', but it must be one of 'stash', 'replay', 'mixed'"),
        (["train", "--lr"], "--lr needs one value (a number), but was given none"),
        (["train", "--epochs", "3", "4"], "--epochs needs one value (a whole number), but was given 3 4"),
        (["train", "--milestones", "1", "two"], "--milestones is 'two', but it must be a list, each entry a number"),
        (["train", "--nesterov=true"], "--nesterov takes no value, but was given true"),
        (["compare", "--method", "bp"], "there is no option --method: did you mean --methods?"),
        (["plan", "--slots", "many"], "--slots is 'many', but it must be a whole number"),
    ],
)
def test_words_that_are_no_options(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}")
    assert error.count("\n") == 1
    assert not list(here.iterdir())


@pytest.mark.parametrize(("text", "expected"), [("epohcs = 3", "'epochs'"), ("epochs = 'three'", "a whole number"), ("epochs", "TOML")])
def test_a_wrong_file_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    (here / "c.toml").write_text(text)
    for words in (["--config", "c.toml"], ["--config=c.toml"]):
        assert main(["train", *words]) == 2
        error = capsys.readouterr().err.strip()
        assert "c.toml" in error
        assert expected in error
        assert "\n" not in error
    assert [path.name for path in here.iterdir()] == ["c.toml"]


# -- the run folder


@pytest.mark.usefixtures("own_random")
def test_a_run_leaves_all_its_files_and_can_be_repeated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--method", "adl", "--accumulate", "3", "--stages", "3", "--epochs", "2", "--log-every", "3", "--lr", "0.05", "--warmup", "3"]
    assert main(["train", *SMALL, *words, "--out", "a"]) == 0
    out = capsys.readouterr().out
    assert "adl(accumulate=3): mlp on digits, 3 stages" in out
    assert "run folder: a" in out
    assert {path.name for path in Path("a").iterdir()} == {"config.toml", "metrics.jsonl", "summary.json", "model.safetensors"}

    told = read(Path("a/summary.json"))
    assert told["status"] == "finished"
    assert (told["method"], told["options"]["accumulate"], told["seed"], told["batches"], told["epochs"]) == ("adl", 3, 0, 8, 2.0)
    assert 0 <= told["test_accuracy"] <= 1
    assert told["samples"] == 256
    assert told["samples_per_second"] == pytest.approx(told["samples"] / told["seconds"])
    assert [stage["updates"] for stage in told["stages"]] == [3, 3, 3]
    assert told["stages"][0]["layer_staleness"] == 4
    assert set(told["versions"]) == {"delock", "torch", "python"}

    lines = [json.loads(text) for text in Path("a/metrics.jsonl").read_text().splitlines()]
    assert [record["batches"] for record in lines if record["event"] == "step"] == [3, 6, 8]
    assert [record["batches"] for record in lines if record["event"] == "evaluation"] == [4, 8]
    assert lines[-1]["test_accuracy"] == told["test_accuracy"]

    config = tomllib.loads(Path("a/config.toml").read_text())
    assert len(config["cuts"]) == 2
    assert "out" not in config

    weights = load_file("a/model.safetensors")
    assert set(weights) == set(build_model("mlp", classes=10, in_channels=1, image_size=8).state_dict())

    assert main(["train", "--config", "a/config.toml", "--out", "b"]) == 0
    again = load_file("b/model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert Path("b/config.toml").read_text() == Path("a/config.toml").read_text()


@pytest.mark.usefixtures("own_random")
def test_the_command_line_wins_over_the_file(here: Path) -> None:
    (here / "c.toml").write_text('method = "fdg"\nbeta = 0.5\nepochs = 50\nbatch-size = 16\nmodel = "mlp"\nworkers = "inline"\n')
    assert main(["train", "--config=c.toml", "--method", "bp", "--batches", "2", "--batch_size=8", "--no-augment", "--out", "a"]) == 0
    config = tomllib.loads(Path("a/config.toml").read_text())
    assert (config["method"], config["batches"], config["batch_size"], config["augment"]) == ("bp", 2, 8, False)
    assert {"beta", "epochs"}.isdisjoint(config)


@pytest.mark.usefixtures("own_random")
def test_an_earlier_run_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", *SMALL, "--batches", "1", "--out", "a"]
    assert main(run) == 0
    before = {path: path.read_bytes() for path in Path("a").iterdir()}
    capsys.readouterr()
    assert main(run) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*run, "--overwrite", "--stages", "99"]) == 2
    assert {path: path.read_bytes() for path in Path("a").iterdir()} == before
    (here / "a" / "notes.txt").write_text("mine")
    assert main([*run, "--overwrite", "--seed", "1"]) == 0
    assert read(Path("a/summary.json"))["seed"] == 1
    assert Path("a/notes.txt").read_text() == "mine"
    (here / "file").write_text("")
    assert main([*run[:-1], "file"]) == 2


@pytest.mark.usefixtures("own_random")
def test_tensorboard_gets_event_files(here: Path) -> None:
    assert main(["train", *SMALL, "--batches", "2", "--out", "a", "--tensorboard"]) == 0
    assert list(Path("a/tensorboard").glob("events*"))


def test_records_as_lines() -> None:
    step = StepRecord(3, 1.5, float("inf"), 0.1, 96, 2.0)
    assert json.loads(dumps(line(step)))["loss"] is None
    evaluation = EvaluationRecord(3, 1.5, 0.5, 0.4, {"accuracy": 0.9}, 2.0, 96)
    assert line(evaluation)["test_accuracy"] == 0.9


# -- runs that end early

STARTED = Started("fdg", "inline", 8, 2.0, (2,), (), 100.0)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (StageFailed("stage 1 failed at B3\n\nTraceback ..."), 1, "failed"),
        (UsageError("the loss is nan at batch 3"), 2, "failed"),
    ],
)
def test_what_was_recorded_is_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, status: str
) -> None:
    def fit(*_: Any, callbacks: Any, **__: Any) -> None:
        [tell] = callbacks
        tell(STARTED)
        tell(StepRecord(3, 0.75, 1.25, 0.1, 96, 2.0))
        raise error

    monkeypatch.setattr("delock.api.fit", fit)
    assert main(["train", *SMALL, "--out", "a"]) == code
    told = read(Path("a/summary.json"))
    assert (told["status"], told["batches"], told["train_loss"], told["samples_per_second"]) == (status, 3, 1.25, 48.0)
    assert len(Path("a/metrics.jsonl").read_text().splitlines()) == 1
    heard = capsys.readouterr().err
    assert "a" in heard
    assert str(error) in heard
