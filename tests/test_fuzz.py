"""Odd inputs of every kind: valid ones run, invalid ones are one line and exit code 2, at once; nothing is overwritten or left behind."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from delock.cli import main

from commands import content
from fuzzing import TINY, Input, caches, configs, images, models, options, texts, traces

pytestmark = pytest.mark.usefixtures("own_random")

FEW, MANY = 8, 150  # inputs of a kind: 1,050 in all
AT_ONCE = 5.0  # seconds
FREE = ["--method", "dgl-async", "--stages", "2", "--buffer", "2", "--epochs", "2"]
Kind = Callable[[random.Random, Path], Iterator[Input]]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """Generators by name; those that need a run have one."""
    place = tmp_path_factory.mktemp("runs")
    assert main(["train", *TINY, "--out", str(place / "plain"), "--no-checkpoint"]) == 0
    shorter = [word for word in TINY if word not in ("--batches", "2", "--workers", "inline")]
    assert main(["train", *shorter, *FREE, "--out", str(place / "free"), "--no-checkpoint"]) == 0
    made = {"models": models(place / "plain"), "traces": traces(place / "free")}
    return {**made, "options": options, "configs": configs, "images": images, "texts": texts, "caches": caches}


KINDS = ("options", "configs", "images", "texts", "models", "traces", "caches")


@pytest.mark.parametrize("kind", KINDS)
def test_a_few(kind: str, kinds: dict[str, Kind], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(kinds[kind], FEW, here, capsys, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_many(kind: str, kinds: dict[str, Kind], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(kinds[kind], MANY, here, capsys, monkeypatch)


def run(kind: Kind, count: int, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place = here / "inputs"
    place.mkdir()
    monkeypatch.setenv("DELOCK_CACHE", str(place / "cache"))
    (here / "kept").mkdir()
    (here / "kept" / "model.safetensors").write_bytes(b"an earlier run")
    kept = content(here / "kept")
    wrong, seen = [], {True: 0, False: 0}
    drawn = kind(random.Random(count), place)
    for number in range(count):
        given = next(drawn)
        seen[given.valid] += 1
        trains = given.words[0] == "train"
        out = ["--out", "kept" if trains and not given.valid and number % 2 else "new"] if trains else []
        began = time.monotonic()
        code = main([*given.words, *out])
        seconds, error = time.monotonic() - began, capsys.readouterr().err
        problems = [
            (code != (0 if given.valid else 2), f"code {code}"),
            ("Traceback" in error, "a traceback"),
            (not given.valid and (not error.startswith("error: ") or error.count("\n") != 1), "not one line"),
            (not given.valid and seconds > AT_ONCE, f"{seconds:.1f} s"),
            (not given.valid and (here / "new").exists(), "a folder of a run that did not begin"),
            (content(here / "kept") != kept, "an earlier run was overwritten"),
        ]
        if found := [what for holds, what in problems if holds]:
            wrong.append(f"{given.what} ({'valid' if given.valid else 'invalid'}): {', '.join(found)}: {error[-300:]}")
        shutil.rmtree(here / "new", ignore_errors=True)
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
    assert seen[True] > count // 8
