"""Models and data of elsewhere on the command line: torchvision, timm, transformers, and files of the user's."""

from __future__ import annotations

import ast
import builtins
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from delock.cli import main
from delock.cli.config import TrainConfig, build, resolve
from delock.cli.models.facts import Facts
from delock.cli.models.names import in_a_folder
from delock.cli.models.vision import build_vision
from delock.cli.workload import build_for, goals, load_data
from delock.data.iterable import as_loader
from delock.errors import UsageError

from commands import refused
from laws import sources

pytestmark = pytest.mark.usefixtures("own_random")

OWN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from own_block import Block

def network(classes, channels, image_size, width=8):
    return nn.Sequential(nn.Flatten(), Block(channels * image_size**2, width), nn.Linear(width, classes))

def writer(vocabulary, **others):
    assert others == {"context": 8}
    return nn.Sequential(nn.Embedding(vocabulary, 8), Block(8, 8), nn.Linear(8, vocabulary))

def line():
    return nn.Sequential(Block(4, 8), nn.Linear(8, 1))

def loss(outputs, targets):
    return nn.functional.mse_loss(outputs, targets)

def points(batch_size, seed):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size, shuffle=True)
    return loader, loader, loss

def untested():
    return {"train": points(8, 0)[0], "test": None, "loss": loss}

def images():
    batch = torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    return {"train": [batch], "test": [batch], "loss": nn.functional.cross_entropy, "classes": 3, "channels": 1, "image_size": 4}

class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = Block(4, 8), Block(8, 8), nn.Linear(8, 1)

    def forward(self, x, labels=None):
        h = self.first(x)
        found = self.last(h + self.second(h))
        return {"found": found, "loss": None if labels is None else loss(found, labels)}

def judge():
    return Judge()

def dicts(batch_size, seed):
    rows = [{"x": x, "labels": y} for x, y in points(batch_size, seed)[0].dataset]
    loader = DataLoader(rows, batch_size=batch_size)
    return {"train": loader, "test": {"near": loader, "far": [{"x": 9 * torch.ones(2, 4), "labels": torch.ones(2, 1)}]}}

def unknown():
    return {"train": [], "tests": []}

def strange():
    return 3

def fails():
    return {}["rows"]

def asks(rows):
    return None
"""
BLOCK = """
from torch import nn

class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.linear(x).relu()
"""
TEXT = Facts(vocabulary=11, context=16)
IMAGES = Facts(classes=5, channels=1, image_size=32)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a file of a user's, another beside it and a text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "own_things.py").write_text(OWN)
    (tmp_path / "own_block.py").write_text(BLOCK)
    (tmp_path / "t.txt").write_text("a cat, a rat and a bat sat.\n" * 20)
    yield tmp_path
    for name in ("own_things", "own_block"):
        sys.modules.pop(name, None)


def config(**values: object) -> TrainConfig:
    return resolve(build(TrainConfig, values, "test"))


def made(**values: object) -> nn.Module:
    """The model of a config, for its data."""
    chosen = config(**values)
    return build_for(chosen, {"digits": Facts(10, 1, 8), "text": TEXT}.get(chosen.dataset.data, Facts()))


def equal(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def plain(*words: str) -> list[str]:
    return [*words, "--workers", "inline", "--batches", "4", "--lr", "0.01"]


# -- files of the user's ---------------------------------------------------------------------------------------------------------------


def test_a_users_network_and_data_train_in_processes_and_are_evaluated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stages' processes import the file, and the one beside it; the numbers are those of one process."""
    words = ["train", "--model", "own_things.py:line", "--data", "own_things.py:points", "--method", "bp", "--batches", "6"]
    assert main([*words, "--batch-size", "8", "--out", "many"]) == 0
    assert main([*words, "--batch-size", "8", "--out", "one", "--workers", "inline"]) == 0
    many, one = ((here / name / "model.safetensors").read_bytes() for name in ("many", "one"))
    assert many == one
    told = json.loads((here / "many" / "summary.json").read_text())
    assert (told["model"], told["data"], told["batches"]) == ("own_things.py:line", "own_things.py:points", 6)
    capsys.readouterr()
    assert main(["eval", "many"]) == 0
    assert capsys.readouterr().out == f"many/model.safetensors: epoch 1.5  test loss {told['test_loss']:.4f}\n"


def test_a_users_network_takes_the_facts_of_the_data(here: Path) -> None:
    network = made(model="own_things.py:network")
    assert [tuple(p.shape) for p in network.parameters()] == [(8, 64), (8,), (10, 8), (10,)]
    assert equal(network, made(model="own_things.py:network", seed=0))
    assert not equal(network, made(model="own_things.py:network", seed=1))


def test_a_file_that_has_changed_ends_no_evaluation_but_a_run_that_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = plain("--model", "own_things.py:line", "--data", "own_things.py:points", "--checkpoint-every", "2", "--out", "run")
    assert main(["train", *words]) == 0
    assert list(json.loads((here / "run" / "files.json").read_text())) == ["own_things.py"]
    assert main(["train", "--resume", "run", "--batches", "6"]) == 0
    (here / "own_things.py").write_text(OWN + "# a note\n")
    capsys.readouterr()
    assert main(["eval", "run"]) == 0
    assert capsys.readouterr().out.startswith("own_things.py has changed since the run in run began (its CRC32 was ")
    assert "own_things.py has changed" in refused(["train", "--resume", "run", "--batches", "8"], here, capsys)
    (here / "t.txt").write_text("to be or not to be. " * 20)
    size = ["--data", "text", "--text", "t.txt", "--width", "16", "--depth", "2", "--context", "8", "--batch-size", "4"]
    assert main(["train", *plain(*size), "--checkpoint-every", "2", "--out", "words"]) == 0
    (here / "t.txt").write_text("to be or not to be. " * 21)
    assert "t.txt has changed since the run in words" in refused(["train", "--resume", "words", "--batches", "6"], here, capsys)
    (here / "t.txt").unlink()
    os.mkfifo(here / "t.txt")  # no program writes into it
    assert "t.txt is no file, so nothing tells whether it is the text of" in refused(["train", "--resume", "words"], here, capsys)


def test_a_network_that_is_no_chain_computes_its_own_loss_on_several_test_sets(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared, it has the bits of plain PyTorch; evaluated, the losses of the run."""
    words = ["--model", "own_things.py:judge", "--data", "own_things.py:dicts", "--batch-size", "6", "--workers", "inline"]
    assert main(["compare", *words, "--batches", "5", "--lr", "0.01", "--methods", "bp", "--out", "both"]) == 0
    bp, plain_ = ((here / "both" / name / "model.safetensors").read_bytes() for name in ("bp", "plain"))
    assert bp == plain_
    told = json.loads((here / "both" / "bp" / "summary.json").read_text())
    capsys.readouterr()
    assert main(["eval", "both/bp"]) == 0
    losses = f"test near/loss {told['test_near/loss']:.3f}  test far/loss {told['test_far/loss']:.3f}"
    assert f"test loss {told['test_loss']:.4f}  {losses}\n" in capsys.readouterr().out


def test_data_without_a_test_trains(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *plain("--model", "own_things.py:line", "--data", "own_things.py:untested", "--out", "run")]) == 0
    assert "has no test data" in refused(["eval", "run"], here, capsys)


def test_facts_in_a_dict_are_those_of_a_named_network(here: Path) -> None:
    chosen = config(model="mlp", data="own_things.py:images")
    data = load_data(chosen)
    loss, metrics = goals(chosen, data)
    assert (loss, metrics) == (nn.functional.cross_entropy, {})
    assert list(build_for(chosen, data.facts).parameters())[-1].shape == (3,)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="does not say: let it return a dict with train, test, loss and classes"):
        build_for(config(model="mlp", data="own_things.py:points"), Facts())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model own_things.py", "own_things.py names no function: write own_things.py:FUNCTION"),
        ("--model none.py:network", "there is no file none.py here"),
        ("--model own_things.py:netwrk", "own_things.py has no function 'netwrk': did you mean 'network'?"),
        ("--model own_things.py:strange", "own_things.py:strange returned a int, but it must return a torch.nn.Module"),
        ("--model own_things.py:fails", "own_things.py:fails failed: KeyError: 'rows' (own_things.py, line "),
        ("--model own_things.py:asks", "own_things.py:asks takes 'rows', which is not known here: give it a default (known are classes"),
        ("--model json.py:loads", "json.py has the name of another module, json ("),
        ("--model broken.py:network", "broken.py cannot be imported: invalid syntax (broken.py, line 1)"),
        ("--model a-b.py:network", "a-b.py cannot be imported, because 'a-b' is no name in Python: rename the file"),
        ("--model x/own_things.py:f --data own_things.py:points", "are two files of one name: rename one of them"),
        ("--model own_things.py:line --dropout 0.1", "dropout is an option of Delock's own networks"),
        ("--data own_things.py:strange", "own_things.py:strange returned a int, but it must return (train, test), (train, test, loss), or"),
        ("--data own_things.py:unknown", "returned a dict with 'tests', but its names are train, test, loss"),
        ("--data own_things.py:untested --batch-size 4", "batch-size is 4, but own_things.py:untested takes no batch_size"),
        ("--data own_things.py:points --limit 9", "limit is an option of images, and the data is own_things.py:points"),
        ("--data own_things.py:points --context 9", "context is an option of language models, and the data is own_things.py:points"),
        ("--data text --text t.txt --model own_things.py:writer --depth 2", "depth is an option of the model gpt, and the model is own_"),
        ("--data text --model timm/resnet10t", "which only the models gpt, hf/CONFIG and FILE.py:FUNCTION read"),
    ],
)
def test_what_is_refused_of_a_users_file(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    (here / "broken.py").write_text("def network(:\n")
    (here / "a-b.py").write_text(OWN)
    (here / "json.py").write_text(OWN)
    assert expected in refused(["train", *words.split(), "--workers", "inline"], here, capsys)


def test_a_users_language_model_is_trained_and_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = plain("--data", "text", "--text", "t.txt", "--context", "8", "--batch-size", "4", "--model", "own_things.py:writer")
    assert main(["train", *words, "--out", "run"]) == 0
    assert "depth" not in (here / "run" / "config.toml").read_text()
    capsys.readouterr()
    assert main(["sample", "run", "--tokens", "12"]) == 0
    text = capsys.readouterr().out
    assert len(text) >= 12
    assert set(text) <= set((here / "t.txt").read_text())
    assert "is no model of transformers" in refused(["export", "run", "--hf", "out"], here, capsys)


# -- torchvision and timm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["torchvision/squeezenet1_1", "torchvision/shufflenet_v2_x0_5", "timm/test_resnet", "timm/test_vit"])
def test_a_network_of_a_library_is_made_for_the_images(model: str) -> None:
    network = build_vision(model, IMAGES, seed=3)
    assert network.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    assert equal(network, build_vision(model, IMAGES, seed=3))
    assert not equal(network, build_vision(model, IMAGES, seed=4))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("torchvision/squeezenet", "no model is called 'torchvision/squeezenet': did you mean 'torchvision/squeezenet1_"),
        ("timm/resnet_10", "no model is called 'timm/resnet_10': did you mean 'timm/resnet"),
        ("timm/zzzzzzzz", "no model is called 'timm/zzzzzzzz': timm has "),
        ("torchvision/vit_b_16", "torchvision/vit_b_16 cannot be made for images of 1 x 9 x 9: "),
    ],
)
def test_what_is_refused_of_a_library(model: str, expected: str) -> None:
    with pytest.raises(UsageError, match=" ") as caught:
        build_vision(model, Facts(5, 1, 9), seed=0)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(("package", "model"), [("timm", "timm/resnet10t"), ("transformers", "hf/gpt2.json")])
def test_a_missing_package_is_one_error(here: Path, monkeypatch: pytest.MonkeyPatch, package: str, model: str) -> None:
    real = builtins.__import__

    def importing(name: str, *rest: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(UsageError, match=rf"comes from a package that is not installed: pip install 'delock\[{model.split('/')[0]}\]'"):
        build_for(config(model=model), IMAGES)


def test_nothing_of_a_library_is_loaded_before_it_is_needed() -> None:
    heavy = {"timm", "transformers", "peft", "huggingface_hub"}
    for tree in sources().values():
        top = [one for one in tree.body if isinstance(one, ast.Import | ast.ImportFrom)]
        assert not heavy & {(getattr(one, "module", None) or one.names[0].name).split(".")[0] for one in top}
    code = "import sys; from delock.cli import main; main(['train', '--help']); print([m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *heavy, "torch"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# -- names -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("torchvision/resnet18", "torchvision-resnet18"),
        ("/some/where/own.py:make", "own-make"),
        ("hf/some/where/gpt2.json", "hf-gpt2"),
        ("hf/some/where/config.json", "hf-where"),
        ("hf/org/name.v1", "hf-name"),
        ("gpt", "gpt"),
    ],
)
def test_a_folder_is_named_after_the_model(model: str, folder: str) -> None:
    assert in_a_folder(model) == folder


def test_data_reads_as_fit_has_it(here: Path) -> None:
    data = load_data(config(model="own_things.py:line", data="own_things.py:points", batch_size=8))
    assert as_loader(data.train) is data.train
    assert len(data.train) == 4
