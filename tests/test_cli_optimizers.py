"""Optimizers and corrections on the command line: what a stage gets, what is refused, rows of a comparison, and files of older runs."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import delock.api
from delock.cli import main
from delock.cli.arguments import parse
from delock.cli.config import CompareConfig, TrainConfig, build, flat, make_method, override, resolve, toml
from delock.cli.config.resolve import can_be_ahead
from delock.cli.config.update import BETAS, BETAS_WITH_SPIKE, RATES
from delock.cli.plan import PlanConfig, find
from delock.cli.rows import rows
from delock.cli.workload import optimizer_factory
from delock.errors import UsageError
from delock.methods import METHODS
from delock.optim.feedback import ErrorFeedback
from delock.optim.muon import SplitMuon
from delock.optim.several import Several
from delock.optim.spike import SCSGD, SCAdamW
from delock.optim.stage_facts import ALONE, StageFacts, for_stage
from delock.recipes import SGD, Adam, AdamW, NAdamW, error_feedback, muon, scadamw, scsgd, soap

from commands import SMALL, refused

pytestmark = pytest.mark.usefixtures("own_random")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Recorder:
    """A factory that keeps what another one makes, by stage."""

    factory: Callable[..., Any]
    made: dict[int, Any] = field(default_factory=dict)

    def __call__(self, named: Any, *, stage: StageFacts = ALONE) -> Any:
        made = for_stage(self.factory, stage)(named)
        self.made.setdefault(stage.k, made)  # others are made to look at what they would keep
        return made


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The optimizers inside the stages of every run of this test, a recorder for each run."""
    whole, found = delock.api.fit, list[Recorder]()

    def fit(*args: Any, optimizer: Callable[..., Any], **options: Any) -> Any:
        found.append(Recorder(optimizer))
        return whole(*args, optimizer=found[-1], **options)

    monkeypatch.setattr("delock.api.fit", fit)
    return found


def config(**values: object) -> TrainConfig:
    return resolve(build(TrainConfig, values, "test"))


def parts(optimizer: Any) -> list[Any]:
    """The optimizer and those that it wraps, from the outside in."""
    return [optimizer, *(part for one in getattr(optimizer, "optimizers", ()) for part in parts(one))]


def classes(optimizer: Any) -> list[str]:
    return [type(one).__name__ for one in parts(optimizer)]


def betas(optimizer: Any) -> set[tuple[float, float]]:
    return {tuple(group["betas"]) for group in optimizer.param_groups if "betas" in group}


ADAM = (0.9, 0.999)
CASES: list[tuple[str, list[str], list[str], tuple[float, float] | None]] = [
    ("--optimizer sgd", ["SGD"], ["SGD"], None),
    ("--optimizer sgd --correct spike", ["SCSGD"], ["SGD"], None),
    ("--optimizer adam", ["Adam"], ["Adam"], ADAM),
    ("--optimizer adam --beta1 0.8 --beta2 0.97", ["Adam"], ["Adam"], (0.8, 0.97)),
    ("--optimizer adamw --beta2 0.97", ["AdamW"], ["AdamW"], (0.9, 0.97)),
    ("--optimizer adamw --correct spike", ["SCAdamW"], ["AdamW"], (0.95, 0.99)),
    ("--optimizer adamw --correct spike --beta1 0.9", ["SCAdamW"], ["AdamW"], (0.9, 0.99)),
    ("--optimizer adamw --correct spike feedback", ["ErrorFeedback", "SCAdamW"], ["AdamW"], (0.95, 0.99)),
    ("--optimizer nadamw --beta1 0.95", ["NAdam"], ["NAdam"], (0.95, 0.999)),
    ("--optimizer nadamw --correct feedback", ["ErrorFeedback", "NAdam"], ["NAdam"], ADAM),
    ("--optimizer muon", ["Several", "SplitMuon", "AdamW"], ["Several", "SplitMuon", "AdamW"], (0.9, 0.95)),
    ("--optimizer muon --beta1 0.8 --beta2 0.9", ["Several", "SplitMuon", "AdamW"], ["Several", "SplitMuon", "AdamW"], (0.8, 0.9)),
    (
        "--optimizer muon --correct feedback",
        ["ErrorFeedback", "Several", "SplitMuon", "AdamW"],
        ["Several", "SplitMuon", "AdamW"],
        (0.9, 0.95),
    ),
    ("--optimizer soap", ["SOAP"], ["SOAP"], (0.95, 0.95)),
    ("--optimizer soap --beta1 0.9 --correct feedback", ["ErrorFeedback", "SOAP"], ["SOAP"], (0.9, 0.95)),
]


# -- what a stage gets


@pytest.mark.parametrize(("words", "late", "last", "pair"), CASES, ids=[words for words, *_ in CASES])
def test_flags_reach_the_optimizer_of_a_stage(
    here: Path, recorders: list[Recorder], words: str, late: list[str], last: list[str], pair: tuple[float, float] | None
) -> None:
    """Stage 0 of two is an update late, the last one is not and has torch's plain optimizer with the same betas."""
    run = ["train", *SMALL, "--method", "ddg", "--cuts", "3", "--batches", "2", *words.split(), "--lr", "0.003", "--weight-decay", "0.25"]
    assert main(run) == 0
    [recorder] = recorders
    assert [classes(recorder.made[k]) for k in (0, 1)] == [late, last]
    for made in recorder.made.values():
        assert betas(made) == ({pair} if pair else set())
        assert {group["initial_lr"] for group in made.param_groups} <= {0.003, 0.003 * 0.1}
        assert max(group["weight_decay"] for group in made.param_groups) == 0.25


def test_corrections_have_the_staleness_of_their_stage(here: Path, recorders: list[Recorder]) -> None:
    run = ["train", *SMALL, "--method", "ddg", "--stages", "3", "--batches", "3", "--correct", "feedback", "spike"]
    for words, r in (("adamw", 2.0), ("sgd", 1.0), ("adamw --horizon 3", 3.0), ("sgd --horizon 0.5", 0.5)):
        assert main([*run, "--optimizer", *words.split()]) == 0
        made = recorders.pop().made
        for k, tau in ((0, 2.0), (1, 1.0)):
            outer, inner = parts(made[k])
            assert isinstance(outer, ErrorFeedback)
            assert isinstance(inner, SCAdamW | SCSGD)
            assert (outer.tau, {group["tau"] for group in inner.param_groups}, inner.param_groups[0]["r"]) == (tau, {tau}, r)


def test_nadamw_has_its_momentum_at_once_and_decouples_its_decay(here: Path, recorders: list[Recorder]) -> None:
    assert main(["train", *SMALL, "--batches", "1", "--optimizer", "nadamw"]) == 0
    for group in recorders[0].made[0].param_groups:
        assert (group["momentum_decay"], group["decoupled_weight_decay"]) == (1.0, True)


def test_the_defaults_are_those_of_the_factories() -> None:
    factories: dict[str, Any] = {"muon": muon(), "soap": soap(), "adam": Adam(0.001), "adamw": AdamW(0.001), "nadamw": NAdamW(0.001)}
    assert {name: made.betas for name, made in factories.items()} == BETAS
    assert {name: made.lr for name, made in factories.items()} | {"sgd": 0.1} == RATES
    assert scadamw().betas == BETAS_WITH_SPIKE
    for name in RATES:
        for data, decay in (("digits", 5e-4), ("text", 5e-4 if name in ("sgd", "adam") else 0.1)):
            values = flat(config(optimizer=name, data=data))
            assert (values["lr"], values["weight_decay"]) == (RATES[name], decay)
            assert (values.get("beta1"), values.get("beta2")) == BETAS.get(name, (None, None))


@pytest.mark.parametrize(
    ("values", "factory"),
    [
        ({"optimizer": "sgd", "nesterov": True}, SGD(0.1, 0.9, 5e-4, nesterov=True)),
        ({"optimizer": "sgd", "correct": ["spike"], "momentum": 0.5}, scsgd(0.1, 0.5, 5e-4)),
        ({"optimizer": "adamw", "data": "text", "correct": ["spike"]}, scadamw(0.001, weight_decay=0.1)),
        ({"optimizer": "muon", "data": "text", "correct": ["feedback"]}, error_feedback(muon(weight_decay=0.1))),
        ({"optimizer": "soap", "weight_decay": 0.01}, soap()),
    ],
)
def test_a_config_is_a_factory(values: dict[str, object], factory: object) -> None:
    assert optimizer_factory(config(**values).update) == factory


# -- what is refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--optimizer adm", "'adam'"),
        ("--optimizer adamw --horizon 3", "horizon belongs to the correction spike: give --correct spike, or leave horizon out"),
        ("--optimizer adamw --correct spike --horizon -1", "horizon is -1, but it must be at least 0"),
        ("--beta1 0.9", "beta1 and beta2 are options of adam, adamw, nadamw, muon, soap, and the optimizer is sgd: give --momentum"),
        ("--optimizer sgd --beta2 0.9", "the optimizer is sgd: give --momentum instead"),
        ("--optimizer adam --beta1 1", "beta1 is 1.0, but it must lie in [0, 1)"),
        ("--momentum 1.5", "momentum is 1.5, but it must lie in [0, 1)"),
        ("--optimizer soap --beta2 -0.1", "beta2 is -0.1, but it must lie in [0, 1)"),
        ("--optimizer muon --momentum 0.9", "momentum and nesterov are options of sgd, and the optimizer is muon"),
        ("--optimizer muon --correct spike", "the optimizer is muon: use adamw, or leave spike out of --correct"),
        ("--optimizer adam --correct feedback spike", "the optimizer is adam: use adamw"),
        ("--correct spike --momentum 0", "momentum is 0: give one above 0, as --momentum 0.9, or leave spike out of --correct"),
        ("--correct spike --momentum 1", "momentum is 1.0, but it must lie in [0, 1)"),
        ("--correct spike --nesterov", "leave out --nesterov, or leave spike out of --correct"),
        ("--correct spice", "--correct is 'spice', but it must be a list, each entry one of 'spike', 'feedback', 'ahead'"),
        ("--method bp --correct ahead", "bp is not late, so there is nothing to be ahead of: leave ahead out of --correct"),
        ("--method ddg --ahead mean --correct ahead", "--ahead is mean, and ahead in --correct says part: give one of them"),
        ("--method dgl --correct feedback ahead", "dgl is not late, so there is nothing to be ahead of"),
        ("--method bp --ahead mean", "bp is not late, so nothing can be ahead: leave ahead out, or set behind"),
        ("--method fgd --correct ahead", "no method is called 'fgd'; did you mean 'fdg'?"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_correction_that_does_not_fit_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, words: str, expected: str
) -> None:
    assert expected in refused([command, *words.split()], here, capsys)


# -- weights ahead


@pytest.mark.parametrize("method", METHODS)
def test_ahead_is_an_option_of_the_method(method: str) -> None:
    if can_be_ahead(method):
        found = config(method=method, correct=["ahead", "feedback"])
        assert make_method(found.algorithm) == METHODS[method](ahead="part").fitted(2)  # type: ignore[call-arg]
        assert (found.algorithm.ahead, found.update.correct) == ("part", ("feedback",))
        assert find(build(PlanConfig, {"method": method, "correct": ["ahead"], "stages": 2}, "test")).method == make_method(found.algorithm)
    else:
        with pytest.raises(UsageError, match=f"{method} is not late"):
            config(method=method, correct=["ahead"])


def test_backpropagation_may_be_ahead_where_it_is_behind() -> None:
    assert config(method="bp", behind=2, correct=["ahead"]).algorithm.ahead == "part"


# -- plans


def test_a_plan_has_the_optimizer_resolved() -> None:
    update = find(build(PlanConfig, {"optimizer": "adamw", "correct": ["spike"]}, "test")).config.update
    assert optimizer_factory(update) == scadamw(weight_decay=5e-4)


def test_the_memory_of_a_plan_is_with_the_optimizer() -> None:
    """AdamW keeps two numbers of four bytes for every weight, SGD without momentum none."""
    uncut = {"profile": "mlp", "data": "synthetic", "image_size": 8, "batch_size": 8, "stages": 1, "weight_decay": 0.0}
    adamw, sgd = (find(build(PlanConfig, uncut | more, "test")).profile for more in ({"optimizer": "adamw"}, {"momentum": 0.0}))
    assert adamw
    assert sgd
    assert sum(map(int, adamw.memory)) > sum(map(int, sgd.memory)) + 7 * sum(sgd.parameters)  # type: ignore[arg-type]


# -- rows of a comparison


def test_rows_have_optimizers_and_corrections_of_their_own(here: Path, recorders: list[Recorder]) -> None:
    words = ["ddg:optimizer=muon:lr=0.01,ddg:optimizer=adamw:correct=spike+feedback:beta1=0.9", "bp:optimizer=soap", "fdg:correct="]
    run = ["compare", *SMALL, "--batches", "2", "--no-plain", "--correct", "spike", "--methods"]
    assert main([*run, "bp", "--out", "spike"]) == 0
    assert main(["compare", *SMALL, "--batches", "2", "--no-plain", "--methods", *words, "--out", "c"]) == 0
    bp, muons, spiked, soaps, plain = [recorder.made[0] for recorder in recorders]
    assert classes(bp) == ["SGD"]  # bp is never late
    assert (type(muons), type(muons.optimizers[0]), muons.param_groups[0]["initial_lr"]) == (Several, SplitMuon, 0.01)
    assert (classes(spiked), betas(spiked)) == (["ErrorFeedback", "SCAdamW"], {(0.9, 0.99)})
    assert (classes(soaps), classes(plain)) == (["SOAP"], ["SGD"])
    kept = tomllib.loads(next(path for path in Path("c").glob("*/config.toml") if "spike" in path.parent.name).read_text())
    assert (kept["optimizer"], kept["correct"], kept["beta1"], kept["beta2"]) == ("adamw", ["spike", "feedback"], 0.9, 0.99)


def test_a_row_takes_the_corrections_of_all_or_its_own() -> None:
    found = rows(build(CompareConfig, {"methods": ["bp,ddg,fdg:correct=feedback"], "optimizer": "adamw", "correct": ["spike"]}, "test"))
    assert [row.config.update.correct for row in found] == [("spike",), ("spike",), ("spike",), ("feedback",)]
    assert [row.config.update.beta1 for row in found] == [0.95, 0.95, 0.95, 0.9]
    with pytest.raises(UsageError, match="the optimizer is muon: use adamw, or leave spike out"):
        rows(build(CompareConfig, {"methods": ["ddg:optimizer=muon"], "optimizer": "adamw", "correct": ["spike"]}, "test"))


def test_ahead_is_said_of_the_rows_that_have_it() -> None:
    found = rows(build(CompareConfig, {"methods": ["bp,dgl"], "correct": ["ahead", "feedback"]}, "test"))
    assert [row.config.update.correct for row in found] == [("feedback",)] * 3
    found = rows(build(CompareConfig, {"methods": ["bp,bp:behind=2"], "correct": ["ahead"]}, "test"))
    assert [row.config.algorithm.ahead for row in found] == [None, None, "part"]
    with pytest.raises(UsageError, match="dgl is not late"):
        rows(build(CompareConfig, {"methods": ["dgl:correct=ahead"]}, "test"))


@pytest.mark.parametrize(
    ("common", "horizons"),
    [
        ({"horizon": 3}, [None, None, 3, None, 1]),
        ({}, [None, None, 2, None, 1]),
        ({"correct": ["spike"], "horizon": 3}, [3, 3, 3, None, 1]),
        ({"correct": ["spike"]}, [2, 2, 2, None, 1]),
    ],
)
def test_a_horizon_is_said_of_the_rows_that_have_spike(common: dict[str, Any], horizons: list[float | None]) -> None:
    words = ["bp", "ddg:correct=spike", "fdg:correct=feedback", "ddg:correct=spike+feedback:horizon=1"]
    found = rows(build(CompareConfig, {"methods": words, "optimizer": "adamw", **common}, "test"))
    assert [row.config.update.horizon for row in found] == horizons


def test_a_horizon_without_spike_in_any_row() -> None:
    with pytest.raises(UsageError, match=r"^horizon belongs to the correction spike"):
        rows(build(CompareConfig, {"methods": ["bp", "ddg:correct=feedback"], "optimizer": "adamw", "horizon": 3}, "test"))


# -- files


OLD = """
method = "ddg"
stages = 2
data = "digits"
model = "mlp"
batches = 3
optimizer = "adamw"
lr = 0.002
nesterov = false
weight_decay = 0.01
"""


def test_a_file_from_before_the_corrections_still_means_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(OLD)
    old = resolve(build(TrainConfig, toml.read(tmp_path / "config.toml"), "config.toml"))
    assert optimizer_factory(old.update) == AdamW(0.002, 0.01)
    assert (old.update.correct, old.algorithm.ahead) == ((), None)


def test_a_run_leaves_a_file_that_repeats_it(here: Path) -> None:
    words = ["train", *SMALL, "--method", "ddg", "--batches", "2", "--optimizer", "adamw", "--correct", "feedback", "spike"]
    assert main([*words, "--out", "a"]) == 0
    kept = tomllib.loads(Path("a/config.toml").read_text())
    assert {name: kept[name] for name in ("optimizer", "correct", "beta1", "beta2", "lr")} == {
        **{"optimizer": "adamw", "correct": ["spike", "feedback"], "beta1": 0.95, "beta2": 0.99, "lr": 0.001}
    }
    assert main(["train", "--config", "a/config.toml", "--out", "b"]) == 0
    assert Path("a/config.toml").read_text() == Path("b/config.toml").read_text()
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()


def test_what_a_correction_puts_out_of_force_in_a_file(tmp_path: Path) -> None:
    """The betas that were meant for spike, or for its absence, and an `ahead` that an earlier list has become."""
    file = {"method": "ddg", "optimizer": "adamw", "correct": ["spike"], "beta1": 0.95, "beta2": 0.99, "ahead": "part", "lr": 0.1}
    both = {"correct": ("spike", "feedback")}
    assert {"ahead": "part", **override(file, both)} == file | both
    assert "ahead" not in override(file, both)
    assert {"beta1", "beta2", "ahead"}.isdisjoint(override(file, {"correct": ()}))
    assert override(file, {"correct": (), "beta1": 0.8})["beta1"] == 0.8
    assert {"beta1", "beta2", "lr"}.isdisjoint(override(file, {"optimizer": "soap"}))
    assert all("horizon" not in override(file | {"horizon": 3.0}, now) for now in ({"correct": ()}, {"optimizer": "sgd"}))
    (tmp_path / "config.toml").write_text(toml.write(file, "an earlier run"))
    again = parse(TrainConfig, ["--config", str(tmp_path / "config.toml"), "--correct"], "train", "")
    assert (again.update.correct, again.update.beta1, again.update.lr, again.algorithm.ahead) == ((), None, 0.1, None)
