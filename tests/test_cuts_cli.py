"""`delock cuts`, and what other commands say of cuts: limits of memory, names inside layers, weights that travel."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from delock.cli import main

from commands import SMALL, refused

pytestmark = pytest.mark.usefixtures("own_random")

OWN = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import delock

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.b(self.a(x).relu())

class Tied(nn.Module):
    def __init__(self, marks):
        super().__init__()
        self.read, self.layers, self.write = nn.Embedding(11, 8), nn.ModuleList([Layer(), Layer(), Layer()]), nn.Linear(8, 11, bias=False)
        self.write.weight = self.read.weight
        self.mark = delock.CutPoint() if marks else None

    def forward(self, x):
        h = self.layers[0](self.read(x))
        if self.mark is not None:
            h = self.mark(h)
        for layer in self.layers[1:]:
            h = layer(h)
        return self.write(h)

def tied():
    return Tied(False)

def marked():
    return Tied(True)

def chain():
    return nn.Sequential(nn.Embedding(11, 8), Layer(), Layer(), nn.Linear(8, 11))

def loss(out, target):
    return cross_entropy(out.flatten(0, 1), target.flatten())

def words():
    g = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 11, (4, 5), generator=g), torch.randint(0, 11, (4, 5), generator=g)
    return [batch, batch], [batch], loss
"""
WORDS = ["--data", "cut_things.py:words"]
WEIGHT, ACTIVATION = 11 * 8 * 4, 4 * 5 * 8 * 4


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a file of a user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "cut_things.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("cut_things", None)


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main(["cuts", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_places_of_a_model_are_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With work, parameters and what crosses; the last line is what `train` takes, and the run has these stages."""
    found = listed(capsys, "--model", "cut_things.py:tied", *WORDS, "--stages", "2")
    places = found["places"]
    assert found["samples"] == 4
    assert {"layers.0", "layers.1", "layers.2", "write"} <= {place["name"] for place in places}
    by_name = {place["name"]: place for place in places}
    assert by_name["layers.1"]["tied"] == {"read.weight": WEIGHT}
    assert (by_name["layers.1"]["tensors"], by_name["layers.1"]["bytes"]) == (2, WEIGHT + ACTIVATION)
    assert sum(place["work"] for place in places) == pytest.approx(1)
    assert [place["before"] for place in places] == pytest.approx([sum(one["work"] for one in places[:i]) for i in range(len(places))])
    assert sum(place["parameters"] for place in places) == 11 * 8 + 3 * 2 * 72
    assert sum(found["work"]) == pytest.approx(1)
    assert all(need > WEIGHT for need in found["needs"])

    assert main(["cuts", "--model", "cut_things.py:tied", *WORDS]) == 0
    text = capsys.readouterr().out
    assert "2 tensors" in text
    assert "read.weight 0.00 MB" in text
    line = text.splitlines()[-1].split()
    assert line == ["--cuts", *found["cuts"]]
    assert main(["train", "--model", "cut_things.py:tied", *WORDS, *line, "--workers", "inline", "--epochs", "1", "--out", "run"]) == 0
    assert tomllib.loads((here / "run" / "config.toml").read_text())["cuts"] == found["cuts"]


def test_all_places_lie_inside_layers_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of a chain, whose layers are otherwise the places; `train` takes their names."""
    usual = [place["name"] for place in listed(capsys, "--model", "cut_things.py:chain", *WORDS)["places"]]
    every = [place["name"] for place in listed(capsys, "--model", "cut_things.py:chain", *WORDS, "--all")["places"]]
    assert usual == ["0", "1", "2", "3"]
    assert every[1:] == ["1", "1.b", "2", "2.b", "3"]
    words = ["train", "--model", "cut_things.py:chain", *WORDS, "--workers", "inline", "--epochs", "1", "--out", "run"]
    assert main([*words, "--cuts", "1.b", "3"]) == 0
    assert "no layer is called '1.c': did you mean '1.b'?" in refused([*words[:-1], "other", "--cuts", "1.c"], here, capsys)


def test_cut_points_are_places(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys, "--model", "cut_things.py:marked", *WORDS)
    assert found["cuts"] == ["mark"]
    assert next(place for place in found["places"] if place["name"] == "mark")["also"] == ["layers.1", "layers.1.a"]
    says = "the model has 1 CutPoint, but 3 stages need 2 cuts"
    assert says in refused(["cuts", "--model", "cut_things.py:marked", *WORDS, "--stages", "3"], here, capsys)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", "--profile", "cut_things.py:chain", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["profile"]


def test_a_limit_of_memory_moves_cuts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a list, in a plan, in a run and from its file; numbers stay numbers."""
    words = ["--model", "cut_things.py:chain", *WORDS, "--method", "bp"]
    free = listed(capsys, *words)
    low = ["--stage-memory", str(free["needs"][0] - 1), "1G"]
    tight = listed(capsys, *words, *low)
    assert tight["cuts"] < free["cuts"]
    assert planned(capsys, *words[2:], *low)["cuts"] < planned(capsys, *words[2:])["cuts"]
    assert main(["train", *words, *low, "--workers", "inline", "--epochs", "1", "--out", "run"]) == 0
    assert tomllib.loads((here / "run" / "config.toml").read_text())["stage_memory"] == [free["needs"][0] - 1, "1G"]
    assert main(["train", "--config", "run/config.toml", "--out", "again"]) == 0
    assert "no cuts into 2 stages keep within stage_memory" in refused(["cuts", *words, "--stage-memory", "1K"], here, capsys)
    assert "stage-memory is '1X'" in refused(["train", *SMALL, "--stage-memory", "1X"], here, capsys)
    assert "stage_memory has 3 limits" in refused(["cuts", *words, "--stage-memory", "1G", "1G", "1G"], here, capsys)


def test_a_plan_names_the_weights_that_travel(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are in the bytes that a stage sends."""
    words = ["plan", "--method", "bp", "--profile", "cut_things.py:tied", *WORDS]
    assert main(words) == 0
    assert "of what stage 0 sends up, 0.00 MB are weights that later stages use too (read.weight)" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    profile = json.loads(capsys.readouterr().out)["profile"]
    assert all(isinstance(cut, str) for cut in profile["cuts"]), "as train takes those of a traced model"
    assert profile["tied"] == [{"read.weight": WEIGHT}]
    assert profile["messages"][0] >= WEIGHT + ACTIVATION
    assert main(["plan", "--method", "bp", "--profile", "cut_things.py:chain", *WORDS]) == 0
    assert "are weights" not in capsys.readouterr().out
