"""Options: types, defaults that depend on others, files, what overrides what, and recipes."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from delock.cli.config import AlgorithmOptions, CompareConfig, TrainConfig, build, flat, make_method, override, resolve, toml
from delock.cli.config.options import CheckpointOptions
from delock.cli.rows import rows
from delock.cli.workload import recipe
from delock.errors import UsageError
from delock.methods import ADL, DSP, METHODS
from delock.optim.factories import SGD, Adam, AdamW
from delock.optim.rates import Schedule
from delock.recipes import accuracy


def config(**values: object) -> TrainConfig:
    return resolve(build(TrainConfig, values, "test"))


def test_no_torch_is_loaded() -> None:
    code = "import sys, delock.cli.config, delock.cli.summary, delock.cli.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_file_repeats_every_resolved_option(name: str) -> None:
    first = config(method=name, cuts=[3, "layer2.0"], lr=1e-5, data_dir='a "b"\\c\n\x7fé', milestones=[1, 2.5], schedule="steps")
    text = toml.write(flat(first), "comment")
    again = resolve(build(TrainConfig, tomllib.loads(text), "file"))
    assert again == first
    assert flat(first)["stages"] == 3
    assert flat(first)["lr"] == 1e-5


def test_every_default_is_filled_in() -> None:
    values = flat(config())
    assert (values["method"], values["micro_batches"], values["accumulate"]) == ("ddg", 1, 1)
    late = flat(config(method="fdg"))
    assert (late["beta"], late["at"], late["order"]) == (1.0, "stash", "forward-first")
    assert (values["stages"], values["epochs"], values["lr"], values["momentum"]) == (2, 20, 0.1, 0.9)
    assert "beta" not in values
    assert flat(config(optimizer="adam"))["lr"] == 0.001
    assert flat(config(batches=7)).get("epochs") is None
    assert flat(config(cuts=[1, 2, 3]))["stages"] == 4
    assert flat(resolve(TrainConfig(), ranks=3))["stages"] == 3


def test_options_reach_the_method() -> None:
    assert make_method(config(method="adl", accumulate=3, reduce="sum").algorithm) == ADL(3, reduce="sum")
    assert make_method(config(method="dsp", p=[2]).algorithm) == DSP(2, 1)
    assert make_method(config(method="dsp", stages=3, p=[2, 1], q=[3, 1]).algorithm) == DSP((2, 1), (3, 1))
    assert make_method(config(method="gpipe", **{"micro-batches": 8}).algorithm).micro_batches == 8


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"methdo": "fdg"}, ["methdo", "'method'"]),
        ({"momemtum": 0.9}, ["momemtum", "'momentum'"]),
        ({"lr": "fast"}, ["lr is 'fast'", "a number"]),
        ({"epochs": 2.5}, ["epochs is 2.5", "a whole number"]),
        ({"epochs": True}, ["epochs is True", "a whole number"]),
        ({"augment": 1}, ["augment is 1", "true or false"]),
        ({"model": 18}, ["model is 18", "text"]),
        ({"optimizer": "sdg"}, ["'sdg'", "'sgd'"]),
        ({"p": 2}, ["p is 2", "a list"]),
        ({"cuts": [1.5]}, ["cuts is [1.5]", "whole number or text"]),
        ({"training": {"lr": 1}}, ["training"]),
    ],
)
def test_a_wrong_key_or_type_is_named(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        build(TrainConfig, values, "my.toml")
    assert all(word in str(caught.value) for word in ["my.toml", *words]), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "fgd"}, ["'fgd'", "'fdg'"]),
        ({"method": "ddg", "beta": 0.5}, ["ddg", "'beta'"]),
        ({"method": "fdg", "at": "replay"}, ["replay", "stash, mixed"]),
        ({"stages": 0}, ["stages is 0"]),
        ({"stages": 2, "cuts": [1, 2]}, ["3 stages, not 2"]),
        ({"epochs": 1, "batches": 1}, ["--epochs or --batches"]),
        ({"batch_size": 0}, ["batch-size is 0"]),
        ({"lr": -1.0}, ["lr is -1"]),
        ({"lr": math.inf}, ["lr is inf"]),
        ({"lr": math.nan}, ["lr is nan"]),
        ({"dropout": 1.0}, ["dropout is 1"]),
        ({"device": "gpu"}, ["'gpu'", "cuda:N"]),
        ({"optimizer": "adam", "momentum": 0.5}, ["momentum", "adam"]),
        ({"nesterov": True, "momentum": 0.0}, ["nesterov"]),
        ({"milestones": [3]}, ["milestones", "cosine"]),
        ({"schedule": "constant", "floor": 0.1}, ["floor", "constant"]),
        ({"gamma": 0.5}, ["gamma", "cosine"]),
        ({"schedule": "constant", "gamma": 0.0}, ["gamma", "constant"]),
        ({"floor": 1.5}, ["floor", "1.5"]),
        ({"schedule": "steps"}, ["--milestones"]),
    ],
)
def test_what_contradicts_itself_is_refused(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        config(**values)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_option_puts_out_of_force_what_was_meant_for_another() -> None:
    file = {"method": "fdg", "beta": 0.5, "stages": 3, "cuts": [1, 2], "epochs": 5, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9}
    file["weight_decay"] = 0.01
    assert override(file, {}) == file
    assert override(file, {"seed": 1}) == {**file, "seed": 1}
    assert "beta" not in override(file, {"method": "adl"})
    assert override(file, {"method": "fdg"})["beta"] == 0.5
    assert override(file, {"method": "adl", "beta": 0.25})["beta"] == 0.25
    assert "cuts" not in override(file, {"stages": 2})
    assert "cuts" not in override(file, {"model": "cnn"})
    assert "cuts" not in override(file, {"depth": 3})
    assert "stages" not in override(file, {"cuts": [4]})
    assert "epochs" not in override(file, {"batches": 9})
    assert {"lr", "momentum", "weight_decay"}.isdisjoint(override(file, {"optimizer": "adam"}))


def test_both_configs_have_the_same_options_but_for_the_method() -> None:
    train, compare = flat(TrainConfig(algorithm=AlgorithmOptions("fdg"))), flat(CompareConfig())
    assert set(compare) - set(train) == {"methods", "plain"}
    assert set(train) - set(compare) == {"method", *flat(TrainConfig()).keys() & CheckpointOptions.__dataclass_fields__.keys()}


@pytest.mark.parametrize(("text", "word"), [("lr = ", "not a TOML file"), ("lr = 1\nlr = 2", "not a TOML file")])
def test_a_file_that_is_no_toml(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=word):
        toml.read(path)
    with pytest.raises(UsageError, match="cannot read"):
        toml.read(tmp_path / "none.toml")


def test_the_learning_rate_counts_updates() -> None:
    schedule = Schedule("cosine", updates=10, warmup=4)
    assert [schedule.factor(n) for n in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.factor(4) == 1.0
    assert schedule.factor(7) == pytest.approx(0.5)
    assert schedule.factor(10) == pytest.approx(0.0)
    kept = Schedule("cosine", updates=10, warmup=4, floor=0.1)
    assert [round(kept.factor(n), 3) for n in (0, 4, 7, 10, 12)] == [0.25, 1, 0.55, 0.1, 0.1]
    assert Schedule("constant", 10).factor(9) == 1.0
    steps = Schedule("steps", 10, milestones=(2, 5), gamma=0.1)
    assert [round(steps.factor(n), 3) for n in (0, 1, 2, 4, 5, 9)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_a_recipe_turns_batches_into_updates() -> None:
    kept = config(method="bp", batches=30, warmup=9, floor=0.1)
    assert recipe(kept, make_method(kept.algorithm), epoch=10, batches=30)[1] == Schedule("cosine", updates=30, warmup=9, floor=0.1)
    chosen = config(method="adl", accumulate=4, warmup=9, schedule="steps", milestones=[1, 2])
    _, schedule = recipe(chosen, make_method(chosen.algorithm), epoch=10, batches=30)
    assert schedule == Schedule("steps", updates=8, warmup=3, milestones=(3, 5), gamma=0.1)
    odd = config(method="bp", schedule="steps", milestones=[1.1])  # 1.1 times 50 is more than 55, in floats
    assert recipe(odd, make_method(odd.algorithm), epoch=50, batches=100)[1].milestones == (55,)


@pytest.mark.parametrize("make", [SGD(0.1, 0.9, 5e-4, True), Adam(0.01, 0.1), AdamW(0.01, 0.1)])
def test_optimizers_and_schedules_travel_to_processes(make: SGD | Adam | AdamW) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 1))
    made = pickle.loads(pickle.dumps(make))([("w", weight)])
    schedule = pickle.loads(pickle.dumps(Schedule("cosine", 10, 2)))(made)
    assert made.param_groups[0]["lr"] == pytest.approx(make.lr / 2)
    assert made.param_groups[0]["weight_decay"] == make.weight_decay
    weight.grad = torch.ones(3, 1)
    made.step()
    schedule.step()
    assert made.param_groups[0]["lr"] == make.lr
    assert bool((weight < 1).all())


@pytest.mark.parametrize("make", [SGD(0.1, 0.9, 5e-4, True), SGD(0.1), Adam(0.01, 0.1), AdamW(0.01, 0.1)], ids=str)
def test_a_fused_step_is_the_plain_one_but_for_rounding(make: SGD | Adam | AdamW) -> None:
    start = torch.linspace(-1, 1, 12).view(4, 3)
    made = [make([("w", torch.nn.Parameter(start.clone()))]) for _ in range(2)]
    for group in made[1].param_groups:
        group.update(fused=False, foreach=False)
    for optimizer in made:
        (weight,) = optimizer.param_groups[0]["params"]
        for i in range(3):
            weight.grad = torch.cos(start + i)
            optimizer.step()
    assert [optimizer.param_groups[0]["fused"] for optimizer in made] == [make != SGD(0.1), False]
    weights = [optimizer.param_groups[0]["params"][0] for optimizer in made]
    assert torch.allclose(*weights, rtol=1e-6, atol=1e-6)
    assert not torch.equal(weights[0], start)


def test_accuracy_is_a_share() -> None:
    assert accuracy(torch.tensor([[1.0, 0], [0, 1], [0, 1]]), torch.tensor([0, 1, 0])) == pytest.approx(2 / 3)


def test_a_head_belongs_to_local_losses() -> None:
    assert config(method="dgl", head="cnn").network.head == "cnn"
    with pytest.raises(UsageError, match="head is cnn, but fdg has no local losses"):
        config(method="fdg", head="cnn")
    made = rows(build(CompareConfig, {"methods": ["bp,dgl"], "head": "cnn"}, "test"))
    assert {row.name: row.config.network.head for row in made} == {"plain": None, "bp": None, "dgl": "cnn"}
