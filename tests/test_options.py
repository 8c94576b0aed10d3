"""The groups of options: one definition for `fit`, the stages' jobs and the command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

import delock
from delock.api import MOVED, fit
from delock.cli.arguments import parse
from delock.cli.config import TrainConfig, build, flat, resolve, toml
from delock.codecs import BF16, VQ
from delock.errors import UsageError
from delock.execution import apply
from delock.methods import METHODS, options
from delock.options import Compression, Execution, Placement, Report, Simulation
from delock.timeline import Emulation, Slowdown

pytestmark = pytest.mark.usefixtures("own_random")

GROUPS = (Execution, Placement, Compression, Simulation, Report)
TEXT = {
    "codec": "vq:dim=8",
    "error_codec": "bf16",
    "slow": "1:0.5",
    "emulate": "5:10",
    "stage_memory": "16G",
}  # of options that may be text


def test_fit_takes_25_arguments_and_the_groups_none_of_their_names() -> None:
    names = inspect.signature(fit).parameters
    assert len(names) == 25
    assert not names.keys() & MOVED.keys()
    assert set(GROUPS) <= {parameter.default.__class__ for parameter in names.values()}


def words(name: str, default: Any, kind: Any) -> list[str]:
    """Gives the option another value than its default."""
    flag = name.replace("_", "-")
    if isinstance(default, bool):
        return [f"--no-{flag}" if default else f"--{flag}"]
    other = get_args(kind)[-1] if get_origin(kind) is Literal else TEXT[name] if name in TEXT else default + 1
    return [f"--{flag}", str(other)]


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("group", GROUPS)
def test_the_command_line_has_the_groups_themselves(group: type[Any]) -> None:
    """Each option of `fit`'s groups by its own name, in the same class."""
    for option in fields(group):
        if option.name == "replay":
            continue
        config = parse(TrainConfig, words(option.name, option.default, get_type_hints(group)[option.name]), "train", "")
        [mine] = [value for name in TrainConfig.__dataclass_fields__ if type(value := getattr(config, name)) is group]
        assert getattr(mine, option.name) != option.default
        assert build(TrainConfig, flat(config), "again") == config


@pytest.mark.usefixtures("own_random")
def test_python_alone_replays() -> None:
    with pytest.raises(UsageError, match="there is no option --replay"):
        parse(TrainConfig, ["--replay", "x"], "train", "")


@pytest.mark.usefixtures("own_random")
def test_help_is_that_of_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"], "train", "")
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    for group in GROUPS:
        for text in re.findall(r'^    """(.*)"""$', inspect.getsource(group), re.MULTILINE)[1:]:
            assert ("Python" in text or "VisitsRecords" in text) or text in shown


def test_the_help_of_an_option_names_the_methods_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"], "train", "")
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    for method in METHODS:
        assert re.search(rf"--method STR [^(]*\b{method}\b", shown)
        for option in options(METHODS[method]):
            assert re.search(rf"--{option.replace('_', '-')} [^(]*\b{method}\b", shown), (method, option)


def test_a_config_has_the_name_of_the_method_itself() -> None:
    for name, method in METHODS.items():
        assert resolve(build(TrainConfig, {"method": name}, "test")).algorithm.method == method.name


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Execution(amp=True), "amp is True, but it must be one of no, bf16"),  # type: ignore[arg-type]
        (lambda: Execution(layout="nhwc"), "layout is 'nhwc', but it must be one of default, channels-last, auto"),  # type: ignore[arg-type]
        (lambda: Execution(chunks=0), "chunks is 0, but it must be at least 1"),
        (lambda: Placement(threads=0), "threads is 0, but it must be at least 1"),
        (lambda: Placement(link="tcp"), "link is 'tcp', but it must be one of auto, gloo, shared"),  # type: ignore[arg-type]
        (lambda: Placement(patience=float("nan")), "patience is nan, but it must be finite, and at least 0"),
        (lambda: Compression("vp"), "no codec is called 'vp'"),
        (lambda: Compression(error_codec="vq"), "errors travel as none, bf16 or int8"),
        (lambda: Compression(error_codec=VQ()), "errors travel as none, bf16 or int8"),
        (lambda: Simulation(slow="1"), "slow is '1', but it must be STAGE:S"),
        (lambda: Simulation(emulate="fast"), "emulate is 'fast', but it must be F:B"),
        (lambda: Report(log_every=0), "log_every is 0, but it must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        make()


def test_an_object_is_what_its_text_stands_for() -> None:
    assert Compression(VQ(dim=8), BF16()).activations == Compression("vq:dim=8").activations
    assert Compression("none", "bf16").errors == Compression(error_codec=BF16()).errors == BF16()
    assert Simulation(emulate="5:10").waits == Simulation(emulate=Emulation(0.005, 0.01)).waits
    assert Simulation(slow="1:0.5").straggler(2, seed=3) == Slowdown(0.5, victim=1, seed=3)


@pytest.mark.parametrize("name", sorted(MOVED))
def test_an_old_keyword_of_fit_names_the_new_spelling(name: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"fit has no keyword {name!r} any more: write {MOVED[name]}")):
        fit(None, None, **{name: 1})  # type: ignore[call-overload]


@pytest.mark.usefixtures("own_random")
def test_the_old_name_of_an_option_is_one_error() -> None:
    for name, new in (("steps", "batches"), ("straggle", "slow"), ("turns", "order")):
        with pytest.raises(UsageError, match=f"there is no option --{name} any more: it is called --{new}"):
            parse(TrainConfig, [f"--{name}", "1"], "train", "")
    for made in (lambda: delock.AsyncDGL(turns="free"), lambda: delock.methods.make("dgl-async", turns="free")):
        with pytest.raises(UsageError, match="dgl-async has no option 'turns' any more: it is called order"):
            made()


def test_the_file_of_an_older_run_still_loads(tmp_path: Path) -> None:
    """One that was written before options were grouped: flat, with old names."""
    lines = ('method = "dgl-async"', 'turns = "sampled"', "steps = 7", 'straggle = "1:0.5"', 'amp = "no"', "threads = 2")
    (tmp_path / "config.toml").write_text("\n".join(lines))
    config = resolve(build(TrainConfig, toml.read(tmp_path / "config.toml"), "config.toml"))
    assert (config.algorithm.order, config.training.batches, config.simulation.slow) == ("sampled", 7, "1:0.5")
    assert (config.execution, config.placement) == (Execution(), Placement(threads=2))


@pytest.mark.parametrize(
    ("group", "given", "words"),
    [
        (Execution, {"chunks": "2"}, "chunks is '2', but it must be a whole number"),
        (Execution, {"chunks": 1.5}, "chunks is 1.5, but it must be a whole number"),
        (Execution, {"compile": None}, "compile is None, but it must be true or false"),
        (Placement, {"threads": True}, "threads is True, but it must be a whole number"),
        (Placement, {"patience": "5"}, "patience is '5', but it must be a number"),
        (Simulation, {"slow": 0.5}, "slow is 0.5, but it must be a delock.Slowdown or text or None"),
        (Simulation, {"replay": "trace"}, "replay is 'trace', but it must be a sequence or None"),
        (Report, {"log_every": 1.5}, "log_every is 1.5, but it must be a whole number"),
    ],
)
def test_a_value_of_another_type_is_named(group: type[Any], given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        group(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"execution": Placement()}, "execution is Placement("),
        ({"compression": "int8"}, "compression is 'int8', but it must be a delock.Compression"),
        ({"report": None}, "report is None, but it must be a delock.Report"),
        ({"batches": 2.5}, "batches is 2.5, but it must be a whole number or None"),
        ({"stages": "2"}, "stages is '2', but it must be a whole number or None"),
        ({"method": delock.FDG}, "it must be a method of delock.methods, as delock.FDG()"),
        ({"optimizer": torch.optim.SGD([torch.ones(1)])}, "the SGD holds a parameter of shape (1,) that is none of the model's"),
    ],
)
def test_fit_names_an_argument_of_another_type(given: dict[str, Any], words: str) -> None:
    usual: dict[str, Any] = {"loss": torch.nn.functional.mse_loss, "optimizer": torch.optim.SGD, "batches": 1, "workers": "inline"}
    with pytest.raises(UsageError, match=re.escape(words)):
        fit(torch.nn.Sequential(torch.nn.Linear(1, 1)), [(torch.ones(2, 1), torch.ones(2, 1))], **usual | given)


def test_more_chunks_than_samples_are_as_many_as_samples() -> None:
    seen: list[int] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x

    assert torch.equal(apply(Execution(chunks=10**18), layer, x := torch.ones(3, 2), torch.device("cpu")), x)
    assert seen == [1, 1, 1]
