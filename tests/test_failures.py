"""What goes wrong, from the user's side: one clear line, the right exit code, nothing written over, nothing lost, no process left."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.api import fit
from delock.cli import main
from delock.errors import StageFailed, UsageError
from delock.links.connect import LinkKind
from delock.records import StepRecord

SMALL = ["--model", "mlp", "--workers", "inline", "--limit", "128", "--batch-size", "32", "--test-batch-size", "512"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a cache of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DELOCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


def content(folder: Path) -> dict[Path, bytes | None]:
    """Everything in a folder; None for a folder in it."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says which is refused; everything in `here` stays as it was."""
    before = content(here)
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert content(here) == before
    return error


# -- bad input ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # methods and their options
        ("--method adl --at replay", "at is 'replay', but it must be one of stash, mixed"),
        ("--method adl --accumulate 0", "accumulate is 0"),
        ("--method gpipe --micro-batches 0", "micro_batches is 0"),
        ("--method gpipe --micro-batches 33", "33 parts, but batch-size is 32: use fewer parts, or larger batches"),
        ("--method bp --accumulate 40", "40 parts, but batch-size is 32"),
        ("--method fdg --beta 0", "beta is 0.0, but it must lie in (0, 1]"),
        ("--method fdg --beta -0.5", "beta is -0.5"),
        ("--method fdg --beta nan", "beta is nan"),
        ("--method dsp --p 1 2", "2 lags p = (1, 2) for 2 stages: there is 1 link"),
        ("--method dsp --q 1 2 --stages 4", "there are 3 links, so give 3, or one for all"),
        ("--method dsp --p 0", "every lag must be at least 1"),
        # cuts
        ("--stages 6", "5 layers into 6 stages: use at most 5"),
        ("--stages 0", "stages is 0, but it must be at least 1"),
        ("--cuts 3 1", "out of order"),
        ("--cuts 2 2", "out of order"),
        ("--cuts 0", "cut 0 is out of range: a later stage starts at one of the layers 1 .. 4"),
        ("--cuts 9", "cut 9 is out of range"),
        ("--cuts hiden2", "no layer is called 'hiden2': did you mean 'hidden2'?"),
        ("--cuts 2 --stages 3", "1 cuts make 2 stages, not 3"),
        # numbers
        ("--epochs 0", "epochs is 0, but it must be at least 1"),
        ("--epochs -1", "epochs is -1"),
        ("--steps 0", "steps is 0"),
        ("--epochs 1 --steps 1", "use --epochs or --steps"),
        ("--batch-size 0", "batch-size is 0"),
        ("--test-batch-size -1", "test-batch-size is -1"),
        ("--threads 0", "threads is 0"),
        ("--warmup -1", "warmup is -1"),
        ("--lr nan", "lr is nan"),
        ("--lr -0.1", "lr is -0.1"),
        ("--schedule steps --milestones 2 -1", "milestones are 2 -1"),
        ("--eval-every 0", "eval-every is 0"),
        ("--log-every 0", "log-every is 0"),
        ("--limit 0", "limit is 0"),
        ("--limit 1438", "between 1 and the 1437 training images"),
        ("--patience -1", "patience is -1"),
        ("--link shared --method dgl-async --turns sampled", "dgl-async drops messages that come too late, which only gloo can do"),
        ("--port 70000", "port is 70000"),
        # a batch of one in front of batch norm
        ("--model cnn --limit 129", "a batch of one sample would put a single sample in front of BatchNorm"),
        ("--model cnn --method gpipe --micro-batches 20", "split into 20 micro-batches, would put a single sample in front of BatchNorm"),
        # data and device
        ("--data digit", "did you mean 'digits'?"),
        ("--data folder", "--data-dir"),
        ("--data folder --data-dir nowhere", "data directory nowhere does not exist"),
        ("--data cifar10 --data-dir nowhere", "Pass --download to fetch it"),
        ("--model resnet9", "did you mean 'resnet8'"),
        ("--device tpu", "device is 'tpu', but it must be cpu, cuda or cuda:N"),
        # where to put it
        (f"--out {'a' * 300}", "File name too long; give another --out"),
        ("--config nowhere.toml", "cannot read the config file nowhere.toml: No such file"),
    ],
)
def test_bad_input(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    assert expected in refused(["train", *SMALL, *words.split(" ")], here, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_no_gpu(here: Path, capsys: pytest.CaptureFixture[str], command: str, workers: str) -> None:
    assert "torch sees no GPU here; use device" in refused([command, *SMALL, "--workers", workers, "--device", "cuda"], here, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epohcs = 3", "there is no option 'epohcs'; did you mean 'epochs'?"),
        ("epochs = 3.5", "epochs is 3.5, but it must be a whole number"),
        ("epochs = true", "epochs is True, but it must be a whole number"),
        ("p = 1", "p is 1, but it must be a list, each entry a whole number"),
        ('at = "stsh"', "at is 'stsh', but it must be one of 'stash', 'replay', 'mixed'"),
        ("epochs = ", "is not a TOML file"),
        ("[training]\nepochs = 3", "[training] begins a table, but all options stand at the top level"),
        ('config = "other.toml"', "a config file cannot name another one"),
        ("batch_size = 0", "batch-size is 0"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_bad_config_files(here: Path, capsys: pytest.CaptureFixture[str], command: str, text: str, expected: str) -> None:
    (here / "c.toml").write_text(text)
    words = [command, "--config", "c.toml"] + (["--methods", "dsp"] if command == "compare" else [])
    if command == "compare" and text.startswith(("p ", "at ")):
        expected = "there is no option"  # of the whole comparison: rows have them
    assert expected in refused(words, here, capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--methods bp fdg:bta=0.5", "did you mean 'beta'?"),
        ("--methods bp --stages 6", "5 layers into 6 stages"),
        ("--methods bp --cuts 3 1", "out of order"),
        ("--methods bp gpipe:micro_batches=32 --model cnn", "in front of BatchNorm"),
        ("--methods bp --limit 129 --model cnn", "in front of BatchNorm"),
        ("--methods bp --steps 0", "steps is 0"),
        ("--methods bp --data folder --data-dir nowhere", "nowhere does not exist"),
    ],
)
def test_a_comparison_refuses_a_bad_row_before_it_trains_the_first(
    here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str
) -> None:
    assert expected in refused(["compare", *SMALL, *words.split()], here, capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--stages 0", "stages is 0"),
        ("--slots 0", "slots is 0"),
        ("--forward -1", "forward is -1, but it must be at least 0"),
        ("--link-delay nan", "link-delay is nan"),
        ("--profile mlp --threads 0", "threads is 0"),
        ("--profile mlp --batch-size 0", "batch-size is 0"),
        ("--profile mlp --stages 9", "cannot cut a network of 5 layers into 9 stages"),
        ("--picture nowhere/p.png", "there is no folder nowhere"),
        ("--method ddg --beta 0.5", "ddg has no option 'beta'"),
        ("--method dgl-async --noise 0.5", "noise slows one of several free-running stages"),
    ],
)
def test_a_plan_that_is_refused(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    assert expected in refused(["plan", *words.split()], here, capsys)


@pytest.mark.parametrize("broken", [b"", b"no image", b"\xff\xd8\xff\xe0\x00\x10JFIF"])
def test_a_broken_image_is_named(here: Path, capsys: pytest.CaptureFixture[str], broken: bytes) -> None:
    from PIL import Image

    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (here / "d" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), name and "red").save(here / "d" / part / name / "1.png")
    (here / "d" / "train" / "dog" / "2.jpg").write_bytes(broken)
    error = refused(["train", *SMALL, "--limit", "2", "--data", "folder", "--data-dir", "d"], here, capsys)
    assert "cannot read the image d/train/dog/2.jpg" in error
    assert "Repair or remove it" in error


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_run_folder_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    rows = ["--methods", "bp", "--no-plain"] if command == "compare" else []
    words = [command, *SMALL, *rows, "--steps", "1", "--out", "a"]
    assert main(words) == 0
    assert "give another --out, or --overwrite to replace the run" in refused(words, here, capsys)
    assert "--overwrite" in refused([*words, "--seed", "1"], here, capsys)
    assert "at most 5" in refused([*words, "--overwrite", "--stages", "6"], here, capsys)
    file = next(path for path in Path("a").iterdir() if path.is_file())
    assert f"cannot use the run folder {file}/b: {file} is a file" in refused([*words[:-1], f"{file}/b"], here, capsys)


def test_a_loss_that_is_no_number(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *SMALL, "--lr", "1e6", "--log-every", "1", "--out", "a"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: the loss of batch \d+ became (nan|inf) at stage 1, after \d+ updates?; lower .*recorded is in a\n", error)
    told = json.loads(Path("a/summary.json").read_text())
    assert told["status"] == "failed"
    assert told["error"] in error
    assert len(Path("a/metrics.jsonl").read_text().splitlines()) == told["steps"] > 0


def test_a_loss_that_is_no_number_in_processes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(["train", *SMALL, "--workers", "processes", "--lr", "1e30"], here, capsys)
    assert re.search(r"the loss of batch \d became nan at stage 1", error)


def test_a_full_disk_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "a/metrics.jsonl")

    monkeypatch.setattr("delock.cli.run_folder.RunFolder.add", full)
    assert main(["train", *SMALL, "--workers", "processes", "--out", "a"]) == 1
    error = capsys.readouterr().err
    assert error == "error: [Errno 28] No space left on device: 'a/metrics.jsonl'; what was recorded is in a\n"


# -- a stage that fails in the middle of a run -------------------------------------------------------------------------------------


class BadBackward(torch.autograd.Function):
    """The identity, whose derivative raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> Tensor:
        raise ZeroDivisionError("the culprit's own words")


class Trouble(nn.Module):
    """The identity until the fifth training batch; only in a stage's process, for the parent measures a copy."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.batch = how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.batch += 1
        if self.batch < 5 or parent_process() is None:
            return x
        match self.how:
            case "forward":
                raise ZeroDivisionError("the culprit's own words")
            case "backward":
                return BadBackward.apply(x)  # type: ignore[no-any-return]
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                a_loop_without_end()
        return x


def a_loop_without_end() -> None:
    while True:
        time.sleep(0.01)


def troubled(how: str, cut: int, patience: float = 60.0, link: LinkKind = "gloo") -> tuple[str, float]:
    """Train with a layer in trouble; the error's message, and the seconds between the last sign of life and the error."""
    net = nn.Sequential(nn.Linear(4, 8), Trouble(how), nn.Linear(8, 8), nn.Linear(8, 2))
    batches = [(torch.randn(6, 4), torch.randint(2, (6,))) for _ in range(12)]
    heard = [time.monotonic()]

    def note(event: object) -> None:
        if isinstance(event, StepRecord):
            heard.append(time.monotonic())

    with pytest.raises(StageFailed) as caught:
        fit(
            net,
            batches,
            loss=nn.functional.cross_entropy,
            method="fdg",
            cuts=[cut],
            optimizer=functools.partial(torch.optim.SGD, lr=0.1),
            epochs=1,
            log_every=1,
            patience=patience,
            link=link,
            on_event=note,
        )
    ended = time.monotonic() - heard[-1]
    assert len(heard) > 1, "it failed before the first batch was through"
    return str(caught.value), ended


@pytest.mark.parametrize(
    ("how", "cut", "expected"),
    [
        ("forward", 2, r"stage 0 failed in F4 \(forward of batch 4, tick 4\): ZeroDivisionError: the culprit's own words"),
        ("forward", 1, r"stage 1 failed in F4 \(forward of batch 4, tick 5\): ZeroDivisionError: the culprit's own words"),
        ("backward", 1, r"stage 1 failed in B4 \(backward of batch 4, tick 5\): ZeroDivisionError: the culprit's own words"),
    ],
)
def test_a_stage_that_raises_ends_the_run_and_is_told(how: str, cut: int, expected: str) -> None:
    message, seconds = troubled(how, cut)
    assert re.match(expected, message), message
    assert "Traceback (most recent call last)" in message
    assert re.search(r'test_failures\.py", line \d+, in (forward|backward)\n', message)
    assert seconds < 10


def test_a_stage_that_raises_in_this_process_is_told_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_failures.parent_process", lambda: 1)
    net = nn.Sequential(nn.Linear(4, 8), Trouble("forward"), nn.Linear(8, 2))
    net[1].batch = -4  # measured three times
    batches = [(torch.randn(6, 4), torch.randint(2, (6,))) for _ in range(12)]
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(StageFailed, match=r"stage 0 failed in F8 \(forward of batch 8, tick 8\): ZeroDivisionError: the culprit's own"):
        fit(net, batches, loss=nn.functional.cross_entropy, cuts=[2], optimizer=optimizer, epochs=1, workers="inline")


@pytest.mark.parametrize("link", ["gloo", "shared"])
def test_a_stage_that_is_killed_is_named(link: LinkKind) -> None:
    message, seconds = troubled("kill", 1, link=link)
    assert message.startswith("stage 1 was killed by SIGKILL (the system does so when memory runs out) in F4 (forward of batch 4, tick 5)")
    assert seconds < 10


@pytest.mark.parametrize("link", ["gloo", "shared"])
def test_a_stage_that_hangs_shows_its_stack(link: LinkKind) -> None:
    message, seconds = troubled("hang", 1, patience=2, link=link)
    assert "stage 1 hangs in F4 (forward of batch 4, tick 5): it has not moved for " in message
    assert "stage 0 waits for stage 1 in " in message
    assert "in a_loop_without_end" in message
    assert seconds < 30


# -- signals -----------------------------------------------------------------------------------------------------------------------

TRAIN = ["train", "--model", "mlp", "--limit", "128", "--batch-size", "32", "--epochs", "100000", "--log-every", "1", "--out", "a"]
COMPARE = ["compare", *TRAIN[1:], "--methods", "bp,fdg"]


class Program:
    """`delock` in a session of its own, as in a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "delock", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def until(self, start: str) -> None:
        """Read its output up to a line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return
        pytest.fail(f"the program ended: {self.process.communicate(timeout=20)}")

    def ends(self, seconds: float) -> tuple[int, str]:
        """Exit code, and what it said to stderr. Its processes have closed its output, and all are gone."""
        began = time.monotonic()
        _, error = self.process.communicate(timeout=60)
        assert time.monotonic() - began < seconds
        wait_until(lambda: not self.family(), 5)
        return self.process.returncode, error

    def family(self) -> dict[int, tuple[int, str]]:
        """Processes of its session, but for those that only wait to be reaped: pid -> (parent, command)."""
        listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,pgid=,stat=,args="], capture_output=True, text=True, check=True)
        found = [line.split(None, 4) for line in listed.stdout.splitlines()]
        own = [line for line in found if int(line[2]) == self.process.pid and line[3][0] != "Z"]
        return {int(pid): (int(parent), args) for pid, parent, _, _, args in own}

    def stages(self) -> list[int]:
        """The processes of its stages: what its fork server has forked, elsewhere what it has spawned."""
        family = self.family()
        servers = self.servers()
        spawned = [pid for pid, (_, args) in family.items() if "multiprocessing.spawn" in args]
        return sorted(spawned or [pid for pid, (parent, _) in family.items() if parent in servers])

    def servers(self) -> list[int]:
        """Its fork server, if there is one, and the stages it has forked, which go by the same name."""
        return [pid for pid, (_, args) in self.family().items() if "multiprocessing.forkserver" in args]


@pytest.fixture
def start(here: Path) -> Iterator[Callable[..., Program]]:
    """Start programs; whatever comes, nothing of them is left."""
    programs: list[Program] = []

    def begin(*words: str) -> Program:
        programs.append(Program(*words))
        return programs[-1]

    yield begin
    for program in programs:
        if program.family():
            os.killpg(program.process.pid, signal.SIGKILL)
        program.process.communicate(timeout=20)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.05)


def status(folder: str) -> str:
    return str(json.loads(Path(folder, "summary.json").read_text())["status"])


@pytest.mark.parametrize(
    ("sent", "group", "code"),
    [([signal.SIGINT], True, 130), ([signal.SIGINT] * 3, True, 130), ([signal.SIGTERM], False, 143)],
    ids=["once", "impatient", "terminate"],
)
def test_a_signal_ends_training_in_order(start: Callable[..., Program], sent: list[signal.Signals], group: bool, code: int) -> None:
    program = start(*TRAIN)
    program.until("epoch 2")
    assert len(program.stages()) == 2
    for number in sent:
        (os.killpg if group else os.kill)(program.process.pid, number)  # a terminal sends it to all of the group
    assert program.ends(5) == (code, "interrupted; what was recorded is in a\n")
    assert status("a") == "interrupted"
    lines = Path("a/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines].count("evaluation") >= 2
    assert {path.name for path in Path("a").iterdir()} == {"config.toml", "metrics.jsonl", "summary.json"}


def test_ctrl_c_ends_a_comparison_in_order(start: Callable[..., Program]) -> None:
    program = start(*COMPARE, "--no-plain")
    program.until("epoch 2")
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.ends(5) == (130, "interrupted; what was recorded is in a\n")
    told = json.loads(Path("a/compare.json").read_text())
    assert [(row["name"], row["summary"]["status"]) for row in told["rows"]] == [("bp", "interrupted")]
    assert status("a/bp") == "interrupted"
    assert Path("a/bp/metrics.jsonl").read_text().endswith("}\n")


@pytest.mark.parametrize("there", ["servers", "stages"])
def test_ctrl_c_while_starting(start: Callable[..., Program], here: Path, there: str) -> None:
    program = start(*TRAIN)
    if there == "stages" or sys.platform == "linux":
        wait_until(lambda: bool(getattr(program, there)()) or program.process.poll() is not None, 60)
    os.killpg(program.process.pid, signal.SIGINT)
    code, error = program.ends(5)
    assert code == 130
    assert error.startswith("interrupted")
    assert error.count("\n") == 1
    assert not list(here.iterdir()) or status("a") == "interrupted"


def test_a_killed_stage_ends_training(start: Callable[..., Program]) -> None:
    program = start(*TRAIN)
    program.until("epoch 2")
    os.kill(program.stages()[1], signal.SIGKILL)
    code, error = program.ends(10)
    assert code == 1
    assert re.match(r"error: stage [01] was killed by SIGKILL .*in [FBUE]", error)
    assert error.endswith("what was recorded is in a\n")
    assert status("a") == "failed"
    assert "evaluation" in Path("a/metrics.jsonl").read_text()


def test_bad_input_leaves_no_process(start: Callable[..., Program], here: Path) -> None:
    program = start(*TRAIN, "--stages", "6")  # found out when the server of the stages' processes has been started
    code, error = program.ends(60)
    assert (code, error.count("\n"), list(here.iterdir())) == (2, 1, [])


def test_a_user_error_in_a_metric_is_told() -> None:
    """One more way in which a user's own code fails, in the last stage."""

    def wrong(outputs: Tensor, targets: Tensor) -> float:
        raise KeyError("accuracy")

    batches = [(torch.randn(6, 4), torch.randint(2, (6,)))]
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(StageFailed, match=r"stage 1 failed in .*evaluation, batch 0.*KeyError: 'accuracy'"):
        fit(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
            batches,
            batches,
            loss=nn.functional.cross_entropy,
            metrics={"accuracy": wrong},
            optimizer=optimizer,
            epochs=1,
            workers="inline",
        )
    with pytest.raises(UsageError, match="cannot be sent to its process"):
        fit(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), batches, loss=lambda a, b: a.sum(), optimizer=optimizer, epochs=1)
