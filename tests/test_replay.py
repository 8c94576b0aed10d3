"""Free-running runs on the command line: trained, compared, done again by `delock replay`, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from delock.api import fit
from delock.cli import main
from delock.cli.growing_file import GrowingFile
from delock.cli.run_folder import load_visits
from delock.cli.seals import sealed
from delock.errors import UsageError
from delock.launch.progress import Progress
from delock.launch.rank import Rank
from delock.methods import AsyncDGL

from harness import CPU
from programs import torchrun

pytestmark = pytest.mark.usefixtures("own_random")

SMALL = ["--model", "mlp", "--limit", "256", "--batch-size", "32", "--test-batch-size", "512", "--no-pin"]
FREE = ["--method", "dgl-async", "--stages", "3"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a free run in three processes, one of them slowed, evaluated three times."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("free") / "run"
    words = [
        *FREE,
        "--buffer",
        "2",
        "--slow-stage",
        "1",
        "--noise",
        "0.5",
        "--epochs",
        "3",
        "--clip",
        "1",
        "--log-every",
        "8",
        "--no-checkpoint",
    ]
    assert main(["train", *SMALL, *words, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copied(ran: Path, here: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(ran, here / "run")
    return Path("run")


def said(code: int, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that a command says, which ends with that code: to stderr unless it is 0."""
    capsys.readouterr()
    assert main(words) == code
    heard = capsys.readouterr()
    return (heard.err if code else heard.out).splitlines()[-1]


# -- a run and its folder ----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_turns_and_tells_of_its_buffers(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in ran.iterdir()} == {"config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "trace.jsonl"}
    turns = load_visits(ran, 3)
    assert [sum(turn.trains for turn in stage) for stage in turns] == [24] * 3
    assert [sum(turn.evaluates for turn in stage) for stage in turns] == [3] * 3
    first = json.loads((ran / "trace.jsonl").read_text().splitlines()[0])
    assert set(first) == {"stage", "ordinal", "source", "trains", "version", "evaluates", "sent", "start", "end", "seal"}
    told = json.loads((ran / "summary.json").read_text())
    assert (told["status"], told["options"]["noise"], told["test_accuracy"] > 0.2) == ("finished", 0.5, True)
    assert "reuse_histogram" not in told["stages"][0]
    for stage, below in zip(told["stages"][1:], turns, strict=False):
        sent = sum(turn.sent and not turn.evaluates for turn in below)
        assert sum(stage["reuse_histogram"].values()) == sent
        assert stage["visits_behind_histogram"].keys() <= {*map(str, range(len(below)))}


def test_it_is_done_again_to_the_last_bit(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in ran.iterdir()}
    line = said(0, ["replay", str(ran)], capsys)
    count = len((ran / "trace.jsonl").read_text().splitlines())
    assert line == f"replayed {count} visits of 3 stages, 24/24/24 updates: the weights equal those of the run, to the last bit"
    assert {path: path.read_bytes() for path in ran.iterdir()} == before


def test_other_weights_are_told(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(copied / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-6
    save_file(weights, copied / "model.safetensors")
    line = said(1, ["replay", "run"], capsys)
    assert line.endswith(f"24/24/24 updates: 1 of {len(weights)} tensors differ from those of the run, such as {name}")


def cut(folder: Path, lines: list[str]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "trace.jsonl").write_text(again_sealed(lines))


def again_sealed(lines: list[str]) -> str:
    """Lines as a run would have written them; an incomplete one stays so."""
    whole = [line for line in lines if line.endswith("\n")]
    text, _ = sealed([re.sub(r', "seal": \d+', "", line) for line in whole], 0)
    return text + "".join(lines[len(whole) :])


def test_a_run_that_was_cut_off_is_done_again_as_far_as_it_goes(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (copied / "trace.jsonl").read_text().splitlines(keepends=True)
    kept = lines[: len(lines) // 2]
    cut(copied, [*kept, lines[len(lines) // 2][:30]])
    line = said(0, ["replay", "run"], capsys)
    assert line.startswith("replayed ")
    assert line.endswith("the run was cut off, and this is as far as its trace goes; it left no weights to compare with")
    assert "24/24/24" not in line


def test_what_cannot_be_done_again_is_counted(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the first turn of stage 0 is left, and so only those turns of the others that read it."""
    lines = (copied / "trace.jsonl").read_text().splitlines(keepends=True)
    below = [line for line in lines if json.loads(line)["stage"] == 0]
    cut(copied, [line for line in lines if line not in below[1:]])
    read = 0
    for turn in load_visits(copied, 3)[1]:
        if turn.evaluates or turn.source:
            break
        read += 1
    assert f" of {len(lines) - len(below) + 1} on record (the others read what is not) of 3 stages, 1/{read}/" in said(
        0, ["replay", "run"], capsys
    )


def test_a_run_of_which_nothing_is_left(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(copied, [])
    assert said(0, ["replay", "run"], capsys).startswith("replayed 0 visits of 3 stages, 0/0/0 updates: the run was cut off")


@pytest.mark.parametrize("damage", ['{"stage": 3}', """{"nonsense": 1}""", '{"stage": 0, "ordinal": 1}', '{"stage": "0"}'])
def test_a_trace_that_is_damaged(copied: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (copied / "trace.jsonl").read_text().splitlines(keepends=True)
    (copied / "trace.jsonl").write_text(again_sealed([*lines[:4], damage + "\n", *lines[4:]]))
    assert said(2, ["replay", "run"], capsys) == "error: line 5 of run/trace.jsonl is not a visit of one of 3 stages"


@pytest.mark.parametrize("how", ["lost", "doubled", "reversed", "changed", "from elsewhere", "begins late"])
def test_lines_that_are_not_where_they_were_written(copied: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of them is a visit, and would be done again as another run."""
    lines = (copied / "trace.jsonl").read_text().splitlines(keepends=True)
    match how:
        case "lost":
            odd = [*lines[:4], *lines[5:]]
        case "doubled":
            odd = [*lines[:5], lines[4], *lines[5:]]
        case "reversed":
            odd = [*lines[:4], lines[5], lines[4], *lines[6:]]
        case "changed":
            odd = [*lines[:4], lines[4].replace('"ordinal": ', '"ordinal": 1'), *lines[5:]]
        case "from elsewhere":
            odd = [*lines[:4], '{"stage": 0}\n', *lines[4:]]
        case _:
            odd = lines[1:]
    (copied / "trace.jsonl").write_text("".join(odd))
    line = {"doubled": 6, "begins late": 1}.get(how, 5)
    assert f"error: line {line} of run/trace.jsonl is not as it was written, or not where" in said(2, ["replay", "run"], capsys)


@pytest.mark.parametrize("end", [1, 3, 40])
def test_a_trace_of_a_whole_run_without_its_end(copied: Path, end: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Visits that are left could be done again, but they are not the run."""
    lines = (copied / "trace.jsonl").read_text().splitlines(keepends=True)
    (copied / "trace.jsonl").write_text("".join(lines)[:-20] if end == 1 else "".join(lines[:-end]))
    error = f"error: run/trace.jsonl holds {len(lines) - end} of the run's {len(lines)} visits: {end} {'is' if end == 1 else 'are'} missing"
    assert said(2, ["replay", "run"], capsys).startswith(error)


def test_a_damaged_trace_is_not_sealed_again(tmp_path: Path) -> None:
    """When a run goes on, its trace is cut back and written anew: a line that was moved would be in its place then."""
    first, second = sealed(['{"stage": 0}', '{"stage": 1}'], 0)[0].splitlines(keepends=True)
    trace, file = tmp_path / "trace.jsonl", GrowingFile[str]("trace.jsonl", str, whole=False, seals=True)
    trace.write_text(first + second + second[:5])
    file.begin(file.kept(lambda values: values["stage"] == 1, tmp_path), tmp_path)
    assert trace.read_text() == sealed(['{"stage": 1}'], 0)[0]
    trace.write_text(second + first)
    with pytest.raises(UsageError, match=r"line 1 of .*trace\.jsonl is not as it was written"):
        file.kept(lambda values: True, tmp_path)
    assert trace.read_text() == second + first


def test_a_model_with_a_bit_that_is_not_as_it_was(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = bytearray((copied / "model.safetensors").read_bytes())
    whole[-3] ^= 16
    (copied / "model.safetensors").write_bytes(whole)
    for words in (["replay", "run"], ["eval", "run"], ["export", "run", "--out", "there"]):
        assert "run/model.safetensors is damaged" in said(2, words, capsys)


# -- a run that went on from a checkpoint ------------------------------------------------------------------------------------------


def test_a_run_that_went_on_is_done_again_from_a_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FREE, "--buffer", "2", "--slow-stage", "1", "--noise", "0.5", "--epochs", "3", "--checkpoint-every", "7"]
    assert main(["train", *SMALL, *words, "--out", "run"]) == 0
    expected = "24/24/24 updates: the weights equal those of the run, to the last bit"
    newest = Path("run/checkpoints/batch-00000021")
    ends = "updates: the weights equal those of the run, to the last bit"
    assert said(0, ["replay", "run", "--from", newest.name], capsys).endswith(ends)
    made = [sum(turn.trains for turn in stage) for stage in load_visits(Path("run"), 3)]
    assert made == [24] * 3
    (Path("run") / "model.safetensors").unlink()
    assert main(["train", *SMALL, *words, "--out", "run", "--resume", str(newest)]) == 0  # as if it had been cut off
    assert said(0, ["replay", "run"], capsys).endswith(expected)
    line = said(0, ["replay", "run", "--from=newest"], capsys)
    assert line.endswith(ends)
    updates = json.loads((newest / "manifest.json").read_text())["updates"]
    assert f", {'/'.join(str(24 - n) for n in updates)} updates" in line
    lines = (Path("run") / "trace.jsonl").read_text().splitlines(keepends=True)
    (Path("run") / "trace.jsonl").write_text(again_sealed(lines[3:]))
    assert "name the checkpoint that the run went on from with --from" in said(2, ["replay", "run"], capsys)
    assert "--from needs a checkpoint" in said(2, ["replay", "run", "--from"], capsys)
    assert "batch-7 is no checkpoint" in said(2, ["replay", "run", "--from", "batch-7"], capsys)
    shutil.rmtree("run/checkpoints")
    assert "there is no checkpoint in run/checkpoints" in said(2, ["replay", "run", "--from", "newest"], capsys)


# -- what is refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_random")
def test_a_folder_that_is_no_free_run(here: Path, ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(2, ["replay"], capsys) == (
        "error: say first which run: delock replay RUN, with the folder of a run with --method dgl-async"
    )
    assert said(2, ["replay", "nowhere"], capsys) == "error: there is no run nowhere"
    (here / "empty").mkdir()
    assert said(2, ["replay", "empty"], capsys) == "error: empty is not the folder of a run: it has no config.toml"
    sampled = [*FREE, "--order", "sampled", "--workers", "inline", "--batches", "2", "--out", "sampled"]
    assert main(["train", *SMALL, *sampled]) == 0
    expected = "error: sampled was not free-running: its plan is fixed, so delock train --config sampled/config.toml repeats it"
    assert said(2, ["replay", "sampled"], capsys) == expected
    assert said(2, ["replay", str(ran), "--buffer", "2"], capsys).startswith("error: there is no option --buffer")
    shutil.copytree(ran, "lost", ignore=shutil.ignore_patterns("trace.jsonl"))
    assert "lost holds no trace.jsonl" in said(2, ["replay", "lost"], capsys)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--buffer 0", "buffer is 0, but it must be at least 1"),
        ("--max-reuse -1", "max_reuse is -1"),
        ("--noise 1", "noise is 1.0, but it must lie in [0, 1): a stage is slowed by S = 1 / (1 - noise)"),
        ("--slow-stage 3", "slow_stage is 3, but the stages are 0 .. 2"),
        ("--workers inline", "free-running stages need a process each: use workers processes, or order sampled or round-robin"),
        ("--order sampled", "sampled turns are taken in one process: use workers inline, or order free"),
        ("--order round-robin", "round-robin turns are taken in one process"),
        ("--order fair", "--order is 'fair', but it must be one of 'forward-first', 'backward-first', 'free', 'sampled', 'round-robin'"),
        ("--noise 0.5 --slow 1:0.5", "noise and slow both make stages slower"),
    ],
)
def test_bad_input(here: Path, words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["train", *SMALL, *FREE, *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error
    assert not list(here.iterdir())


@pytest.mark.usefixtures("own_random")
def test_an_option_of_another_method(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "dgl has no option 'buffer'" in said(2, ["train", *SMALL, "--method", "dgl", "--buffer", "3"], capsys)


# -- other ways to run -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("own_random")
def test_rows_of_a_comparison_run_freely_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--methods", "dgl,dgl-async,dgl-async:buffer=1:max_reuse=1", "--no-plain"]
    assert main(["compare", *SMALL, *methods, "--stages", "2", "--batches", "8", "--out", "c"]) == 0
    told: Any = json.loads(Path("c/compare.json").read_text())
    assert [row["summary"]["status"] for row in told["rows"]] == ["finished"] * 3
    assert [row["staleness"] for row in told["rows"]] == [[0, 0]] * 3
    assert not Path("c/trace.jsonl").exists()
    assert not Path("c/dgl/trace.jsonl").exists()
    for folder in ("c/dgl-async", "c/dgl-async-buffer=1-max_reuse=1"):
        assert "to the last bit" in said(0, ["replay", folder], capsys)
    again = ["compare", *SMALL, "--methods", "dgl", "--no-plain", "--batches", "1", "--out", "c", "--overwrite"]
    assert main(again) == 0
    assert {path.name for path in Path("c").iterdir() if path.is_dir()} == {"dgl"}


@pytest.mark.usefixtures("own_random")
def test_a_comparison_refuses_turns_that_its_workers_cannot_take(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", *SMALL, "--no-plain", "--methods", "dgl,dgl-async"]
    assert "free-running stages need a process each" in said(2, [*words, "--workers", "inline"], capsys)
    assert "taken in one process" in said(2, [*words[:-1], "dgl-async:order=sampled"], capsys)
    assert not list(here.iterdir())


SCRIPT = """
import sys
from delock.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_ranks_of_torchrun_run_freely(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "script.py").write_text(SCRIPT)
    words = [*SMALL, "--method", "dgl-async", "--epochs", "2"]
    done = torchrun(here / "script.py", *words, "--out", "a")
    assert done.returncode == 0, done.stderr
    turns = load_visits(Path("a"), 2)
    assert [sum(turn.trains for turn in stage) for stage in turns] == [16, 16]
    assert said(0, ["replay", "a"], capsys).endswith("16/16 updates: the weights equal those of the run, to the last bit")


@pytest.mark.usefixtures("own_random")
def test_ranks_of_torchrun_take_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is a process of its own, so drawn turns are refused there, too, before anything is measured."""
    monkeypatch.setattr("delock.api.under_torchrun", lambda: True)
    monkeypatch.setattr(
        "delock.run.carry_out.run_torchrun", lambda target, spec_of, telling, **_: target(Rank(0, 2, CPU, print, Progress()), spec_of(0))
    )
    with pytest.raises(UsageError, match=r"^sampled turns are taken in one process"):
        fit(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [(None, None)], loss=nn.functional.mse_loss, method=AsyncDGL(order="sampled"),
            optimizer=torch.optim.SGD, batches=1)  # fmt: skip
