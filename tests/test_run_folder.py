"""The run folder: it is one run's, and a disk that is full, read-only or gone costs no record and no weights."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import delock.api
from delock.cli import main
from delock.cli.held_folder import HeldFolder
from delock.cli.run_folder import RunFolder, load_visits
from delock.errors import UsageError
from delock.records import StepRecord, Visit, VisitsRecord

from commands import SMALL, content, refused

pytestmark = pytest.mark.usefixtures("own_random")

RUN = ["train", *SMALL, "--no-checkpoint", "--cuts", "3", "--epochs", "2", "--log-every", "1", "--out"]
HOLD = """
import sys
from delock.cli.held_folder import HeldFolder
from pathlib import Path
HeldFolder(Path("a"), new=False, overwrite=False).take()
print("held", flush=True)
sys.stdin.read()
"""


def record(batches: int) -> StepRecord:
    return StepRecord(batches, batches / 4, 1.5, 0.1, 32 * batches, 0.5 * batches)


def noted(folder: Path) -> list[int]:
    return [json.loads(text)["batches"] for text in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(cache: Path) -> Path:
    """The only run that was saved elsewhere."""
    (found,) = (cache / "unsaved").iterdir()
    return found


@pytest.fixture
def disk(here: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a disk of so many bytes as the folder `disk`."""

    def mount(size: int) -> Path:
        (here / "disk").mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(here / "disk")], capture_output=True, check=False)
        if made.returncode:
            pytest.skip("only root can mount a small disk")
        return Path("disk")

    yield mount
    if os.path.ismount(here / "disk"):
        subprocess.run(["umount", str(here / "disk")], check=True)


def fill(disk: Path) -> Path:
    """Fills a disk to the last byte."""
    with suppress_full(), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return disk / "filler"


def suppress_full() -> Any:
    return pytest.raises(OSError, match="No space left")


def during(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], batch: int = 3) -> None:
    """Lets `act` happen when a batch has been recorded."""
    whole = delock.api.fit

    def fit(*args: Any, callbacks: list[Callable[[Any], None]], **options: Any) -> Any:
        def hear(event: Any) -> None:
            callbacks[0](event)
            if isinstance(event, StepRecord) and event.batches == batch:
                act()

        return whole(*args, callbacks=[hear], **options)

    monkeypatch.setattr("delock.api.fit", fit)


# -- one run per folder


def test_a_folder_in_use_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*RUN, "a", "--overwrite"]
    with RunFolder(Path("a"), "x").held():
        for command in (words, ["compare", *SMALL, "--methods", "bp", "--out", "a"]):
            error = refused(command, here, capsys)
            assert error == f"error: the run folder a is in use by another run (process {os.getpid()}): give another --out\n"
    assert list(here.iterdir()) == []
    assert main(words) == 0


@pytest.mark.slow
def test_of_two_runs_started_together_one_is_refused_before_it_trains(here: Path) -> None:
    command = [sys.executable, "-m", "delock", *RUN, "new/a", "--epochs", "200"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=120) for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2]
    first, second = (0, 1) if runs[0].returncode == 0 else (1, 0)
    assert said[second] == ("", f"error: the run folder new/a is in use by another run (process {runs[first].pid}): give another --out\n")
    assert len(noted(Path("new/a"))) == 1000
    assert sorted(path.name for path in Path("new/a").iterdir()) == ["config.toml", "metrics.jsonl", "model.safetensors", "summary.json"]


@pytest.mark.parametrize("before", ["nothing", "a killed run's lock"])
def test_one_of_many_takes_a_folder(here: Path, before: str) -> None:
    """Sixteen that look for it at the same moment, while others keep nothing and go."""
    if before != "nothing":
        Path("new/a").mkdir(parents=True)
        Path("new/a/.lock").write_text("1\n")
    taken: list[HeldFolder] = []
    said: list[str] = []
    start = Barrier(16)

    def take(i: int) -> None:
        start.wait(20)
        for _ in range(20 if i else 1):
            folder = HeldFolder(Path("new/a"), new=False, overwrite=False)
            try:
                folder.take()
            except UsageError as error:
                said.append(str(error))
                continue
            assert folder.holds()
            taken.append(folder)
            assert len(taken) == 1
            taken.remove(folder)
            folder.release(keep=False)

    def noting(i: int) -> None:
        try:
            take(i)
        except BaseException as error:
            failed.append(error)

    failed: list[BaseException] = []
    threads = [Thread(target=noting, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
    assert [text for text in said if not re.search("in use by another run|is being removed|cannot use", text)] == []
    HeldFolder(Path("new/a"), new=False, overwrite=False).take()


def test_a_killed_run_lets_the_next_one_in(here: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"in use by another run \(process {holder.pid}\)"), RunFolder(Path("a"), "x").held():
            pass
        holder.send_signal(signal.SIGKILL)
    assert [path.name for path in Path("a").iterdir()] == [".lock"]
    with RunFolder(Path("a"), "x").held():
        pass


def test_without_out_every_run_has_a_folder_of_its_own(here: Path) -> None:
    folders = [HeldFolder(Path("runs/now"), new=True, overwrite=False) for _ in range(3)]
    with ExitStack() as stack:
        for folder in folders:
            folder.take()
            stack.callback(folder.release, keep=folder is folders[1])
        assert [folder.path.name for folder in folders] == ["now", "now-2", "now-3"]
    assert sorted(here.rglob("*")) == [here / "runs", here / "runs" / "now-2"]
    assert RunFolder(None, "x").path.parts[0] == "runs"


# -- disks


def test_a_full_disk_is_refused_before_the_start(here: Path, disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    fill(disk(1 << 16))
    assert "cannot use the run folder disk/a: No space left on device; give another --out" in refused([*RUN, "disk/a"], here, capsys)


def test_a_model_without_room_is_saved_elsewhere(here: Path, disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "whole"]) == 0
    assert Path("whole/model.safetensors").stat().st_size > 1 << 16
    disk(1 << 16)
    capsys.readouterr()
    assert main([*RUN, "disk/a"]) == 1
    heard, place = capsys.readouterr(), saved(here.parent / "cache")
    assert heard.err == (
        "warning: cannot write disk/a/model.safetensors: No space left on device. The run goes on and forgets nothing: make room on the "
        "disk of disk/a, else it will be saved elsewhere at its end\n"
        f"error: the run folder disk/a could not take model.safetensors: No space left on device. The run was saved in {place}; "
        "make room on the disk of disk/a and move it there\n"
    )
    assert f"run folder: {place}\n" in heard.out
    assert {path.name for path in place.iterdir()} == {path.name for path in Path("whole").iterdir()}
    for name in ("config.toml", "model.safetensors"):
        assert (place / name).read_bytes() == Path("whole", name).read_bytes()
    assert noted(place) == noted(Path("whole")) == noted(Path("disk/a"))
    assert json.loads((place / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("how", ["removed", "a file", "another run's", "read-only", "full"])
def test_a_folder_lost_during_a_run(
    here: Path, disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    def lose() -> None:
        if how == "full":
            fill(here / "disk")
        elif how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(here / "disk")], check=True)
        else:
            shutil.rmtree("disk/a")
        if how == "a file":
            Path("disk/a").touch()
        if how == "another run's":
            other.enter_context(RunFolder(Path("disk/a"), "x").held())

    disk(1 << 20)
    during(monkeypatch, lose)
    with ExitStack() as other:
        assert main([*RUN, "disk/a"]) == 1
        if how == "another run's":
            assert {path.name for path in Path("disk/a").iterdir()} == {".lock"}
    place, (warning, error) = saved(here.parent / "cache"), capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: cannot write disk/a/m")
    why = {"read-only": "Read-only file system", "full": "No space left on device"}.get(how, "the folder is gone")
    files = [*([] if how == "full" else ["metrics.jsonl"]), "model.safetensors", "summary.json"]  # its last page has room for some lines
    assert error.startswith(f"error: the run folder disk/a could not take {', '.join(files)}: {why}. The run was saved in {place}; ")
    assert noted(place) == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert set(load_file(place / "model.safetensors"))


def test_a_disk_with_room_again_has_everything(here: Path, disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(disk(1 << 18) / "a", "x")
    with folder.held():
        folder.open()
        for batches in range(1, 200):
            if batches == 20:
                filler = fill(Path("disk"))
            if batches == 180:
                filler.unlink()
            folder.add(record(batches))
            if batches == 150:
                assert noted(folder.path) == list(range(1, noted(folder.path)[-1] + 1)), "half a line"
                assert noted(folder.path)[-1] < 100
                folder.save_model({"weight": torch.ones(3)})
        assert noted(folder.path) == list(range(1, 200))
        folder.settle()
    assert folder.lost is None
    assert {path.name for path in Path("disk/a").iterdir()} == {"metrics.jsonl", "model.safetensors"}
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("gone", [False, True])
def test_visits_move_too_unless_they_are_gone(here: Path, disk: Callable[..., Path], gone: bool) -> None:
    visits = [VisitsRecord(0, tuple(Visit(i, i, True, i) for i in range(first, first + 50))) for first in (0, 50, 100)]
    folder = RunFolder(disk(1 << 16) / "a", "x")
    with folder.held():
        folder.open()
        folder.add_visits(visits[0])
        fill(Path("disk"))
        if gone:
            shutil.rmtree("disk/a")
        for some in visits[1:]:
            folder.add_visits(some)
        folder.settle()
    assert folder.lost is not None
    assert folder.path == saved(here.parent / "cache")
    assert ("but for trace.jsonl" in folder.lost) == gone
    assert (folder.path / "trace.jsonl").exists() == (not gone)
    if not gone:
        assert [visit.ordinal for visit in load_visits(folder.path, 1)[0]] == list(range(150))


def test_the_next_place_is_taken_if_the_first_has_no_room(
    here: Path, disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("DELOCK_CACHE", "disk/cache")
    folder = RunFolder(disk(1 << 16) / "a", "x")
    with folder.held():
        folder.open()
        folder.add(record(1))
        folder.save_model({"weight": torch.ones(1 << 15)})
        folder.settle()
    assert folder.path.parent == tmp_path / "temporary"
    assert folder.path.name.startswith("delock-a-")
    assert load_file(folder.path / "model.safetensors")["weight"].eq(1).all()
    assert list(Path("disk/cache/unsaved").iterdir()) == [], "half a run"


@pytest.mark.slow
def test_no_place_at_all(here: Path) -> None:
    """Files may have 10 KB, wherever they are."""
    command = [sys.executable, "-m", "delock", *RUN, "a"]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10_000, 10_000))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: the run folder a could not take model.safetensors: {os.strerror(errno.EFBIG)}, nor could ")
    assert f"{here.parent / 'cache' / 'unsaved'} ({os.strerror(errno.EFBIG)}) and " in error
    assert "What is not in a is lost" in error
    assert len(noted(Path("a"))) == 10
    assert "test accuracy" in done.stdout


def test_a_comparison_without_room(here: Path, disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    disk(1 << 14)
    words = ["compare", *SMALL, "--batches", "2", "--methods", "bp,fdg", "--no-plain", "--out", "disk/c"]
    assert main(words) == 1
    heard = capsys.readouterr()
    assert re.search(r"\nbp .*\nfdg ", heard.out)
    places = {re.sub(r"-\d{4}-\d\d-.*", "", path.name): path for path in (here.parent / "cache" / "unsaved").iterdir()}
    for row in ("bp", "fdg"):
        assert re.search(rf"error: {row}: the run folder disk/c/{row} could not take .*model\.safetensors", heard.err)
        assert load_file(places[f"c-{row}"] / "model.safetensors")
    assert {path.name for path in places["c"].iterdir()} == {"compare.json", "compare.md", "compare.png", "compare.svg"}
    assert heard.err.splitlines()[-1].startswith("error: the run folder disk/c could not take compare.")


@pytest.mark.slow
def test_a_log_without_room_costs_no_run(here: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "delock", *RUN, "a"], stdout=full, stderr=full, timeout=120, check=False)
    assert done.returncode == 0
    assert Path("a/model.safetensors").exists()


def test_bad_input_leaves_an_empty_folder_empty(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a").mkdir()
    refused([*RUN, "a", "--batch-size", "1", "--model", "cnn"], here, capsys)
    assert content(here) == {here / "a": None}
