"""The key of a trace: the same for the same model in another program, another one for every change of what the trace follows from."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.data.call import Call
from delock.partition.graph.examples import Examples
from delock.partition.traces.trace_key import trace_key

NET = """
import torch
from torch import nn

import key_helper
from key_helper import scale

BY = 2.0
STEPS = [1, 2, 3]

class Options:
    def __init__(self):
        self.eps, self.names = 1e-5, {"a": 1, "b": (2, torch.float32)}

class Block(nn.Module):
    kind = "block"

    def __init__(self, wide):
        super().__init__()
        self.linear = nn.Linear(wide, wide)
        self.act = torch.relu

    def forward(self, x):
        return scale(self.act(self.linear(x)), BY) + key_helper.shift

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(4) for _ in range(3))
        self.options = Options()
        self.seen = {"left", "right", "above", "below"}
        self.register_buffer("table", torch.ones(4))
        self.loose = torch.ones(4)

    def forward(self, x):
        nn.functional
        from key_later import last
        for block in self.blocks:
            x = block(x) + self.options.eps * self.loose
        return last(x) * self.table
"""
HELPER = """
import functools

shift = 1.0

@functools.cache
def size(x):
    return x + 2

def scale(x, by):
    return inner(x) * by + size(1)

def inner(x, more=1):
    return x + more
"""
LATER = """
import os

LIMIT = 3

def last(x):
    return x.clamp(max=LIMIT) if os.environ.get("KEY_OF_A_TEST") else x
"""
FILES = {"key_net": NET, "key_helper": HELPER, "key_later": LATER}
BATCH = torch.zeros(4, 4)


def imported(at: Path, changes: dict[str, tuple[str, str]]) -> ModuleType:
    """The module of the net, loaded anew from files that are changed in some lines."""
    for name, text in FILES.items():
        old, new = changes.get(name, ("", ""))
        assert old in text
        sys.modules.pop(name, None)
        (at / f"{name}.py").write_text(text.replace(old, new, 1))
    importlib.invalidate_caches()
    importlib.import_module("key_later")
    return importlib.import_module("key_net")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the modules, which are gone afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name, None)


def key(model: nn.Module, *asked: object, batch: Tensor = BATCH, call: Call | None = None) -> str:
    return trace_key(model, call or Call(), Examples.by_rows([batch], len(batch), nn.Identity()), *asked)


def made(at: Path, **changes: tuple[str, str]) -> Any:
    with torch.random.fork_rng():
        return imported(at, changes).Net()


# -- the same ----------------------------------------------------------------------------------------------------------------------


def test_the_same_model_has_the_same_key(place: Path) -> None:
    """In files that are read anew, with other values of its weights, and with hooks, which the whole program counts."""
    model = made(place)
    plain = key(model)
    model.blocks[0].register_forward_hook(forward_of_mine)
    hooked = key(model)
    assert "" != plain != hooked != ""
    model = made(place)
    with torch.no_grad():
        model.blocks[0].linear.weight.add_(1)
        model.table.add_(1)
    assert key(model) == plain
    model.blocks[0].register_forward_hook(forward_of_mine)
    assert key(model) == hooked


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import key_later, key_net, torch
from torch import nn
from delock.data.call import Call
from delock.partition.graph.examples import Examples
from delock.partition.traces.trace_key import trace_key
torch.set_num_threads(1)
batch = torch.zeros(4, 4)
print(trace_key(key_net.Net(), Call(), Examples.by_rows([batch], 4, nn.Identity())))
"""


def test_the_same_model_has_the_same_key_in_other_programs(place: Path) -> None:
    """Texts are hashed with another salt there, so that sets have another order."""
    made(place)
    run = partial(subprocess.run, [sys.executable, "-c", PROGRAM, str(place)], stdout=subprocess.PIPE, text=True, check=True)
    first, again = run(), run()
    assert first.stdout == again.stdout != "\n"


# -- other code --------------------------------------------------------------------------------------------------------------------

CODE: dict[str, dict[str, tuple[str, str]]] = {
    "a line of forward": {"key_net": ("return last(x) * self.table", "return last(x) + self.table")},
    "a part's forward": {"key_net": ("self.act(self.linear(x))", "self.linear(self.act(x))")},
    "a class attribute": {"key_net": ('kind = "block"', 'kind = "other"')},
    "a constant of the file": {"key_net": ("BY = 2.0", "BY = 3.0")},
    "a helper": {"key_helper": ("inner(x) * by", "inner(x) / by")},
    "a helper's helper": {"key_helper": ("return x + more", "return x - more")},
    "a cached helper": {"key_helper": ("return x + 2", "return x + 3")},
    "a helper's default": {"key_helper": ("more=1", "more=2")},
    "a helper's constant": {"key_helper": ("shift = 1.0", "shift = 2.0")},
    "what forward imports": {"key_later": ("x.clamp(max=LIMIT)", "x.clamp(min=LIMIT)")},
}


@pytest.mark.parametrize("what", CODE)
def test_other_code_is_another_key(what: str, place: Path) -> None:
    before = key(made(place))
    assert "" != before != key(made(place, **CODE[what])) != ""


def test_globals_count_as_they_are_now(place: Path) -> None:
    model = made(place)
    keys = {key(model)}
    for name, where, value in (
        ("BY", "key_net", 5.0),
        ("shift", "key_helper", 5.0),
        ("LIMIT", "key_later", 5),
        ("inner", "key_helper", sys.modules["key_helper"].scale),
    ):
        setattr(sys.modules[where], name, value)
        keys.add(key(model))
    sys.modules["key_net"].Block.kind = "changed"  # type: ignore[attr-defined]
    keys.add(key(model))
    assert len(keys) == 6
    assert "" not in keys


def forward_of_mine(self: Any, x: Tensor) -> Tensor:
    return x


def test_an_installed_method_that_was_replaced_counts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(made(place))
    monkeypatch.setattr(nn.Linear, "forward", forward_of_mine)
    assert "" != before != key(made(place)) != ""


def test_a_function_of_mine_in_a_registry_of_a_package_counts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(place)
    keys = [key(model)]
    monkeypatch.setitem(nn.modules.module._global_forward_hooks, 1, forward_of_mine)  # type: ignore[misc]
    keys.append(key(model))
    monkeypatch.setattr(nn.functional, "relu", forward_of_mine)
    keys.append(key(model))
    assert len(set(keys)) == len(keys)
    assert "" not in keys


def test_the_environment_counts_where_code_asks_for_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(made(place))
    monkeypatch.setenv("ANOTHER_OF_A_TEST", "1")
    assert key(made(place)) == before
    monkeypatch.setenv("KEY_OF_A_TEST", "1")
    assert key(made(place)) != before


# -- another configuration ---------------------------------------------------------------------------------------------------------


def tie(model: Any) -> None:
    model.blocks[1].linear.weight = model.blocks[0].linear.weight


def closure(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * by


CONFIGURATION: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda model: setattr(model.options, "eps", 1e-6),
    "a new attribute": lambda model: setattr(model, "more", None),
    "a number of another type": lambda model: model.options.names.update(a=1.0),
    "deep inside": lambda model: model.options.names.update(b=(2, torch.float64)),
    "a set": lambda model: model.seen.add("inside"),
    "a function": lambda model: setattr(model.blocks[1], "act", torch.tanh),
    "a closure": lambda model: setattr(model.blocks[1], "act", closure(2.0)),
    "another closure": lambda model: setattr(model.blocks[1], "act", closure(3.0)),
    "a partial": lambda model: setattr(model.blocks[1], "act", partial(torch.clamp, min=0)),
    "a forward of its own": lambda model: setattr(model.blocks[1], "forward", closure(2.0)),
    "a hook": lambda model: model.blocks[1].register_forward_hook(forward_of_mine),
    "evaluation": lambda model: model.blocks[1].eval(),
    "frozen": lambda model: model.blocks[1].requires_grad_(False),
    "a dtype": lambda model: model.blocks[1].double(),
    "a shape": lambda model: setattr(model, "table", torch.ones(1)),
    "strides": lambda model: setattr(model.blocks[1].linear, "weight", nn.Parameter(torch.ones(4, 4).t())),
    "a tie": tie,
    "a plain tensor's values": lambda model: model.loose.mul_(2),
    "a buffer that is not saved": lambda model: model.register_buffer("table", model.table, persistent=False),
    "no buffer": lambda model: model.register_buffer("table", None),
    "a part": lambda model: model.blocks.append(nn.Identity()),
    "the order of parts": lambda model: model.blocks.insert(0, model.blocks.pop(2)),
    "a dynamic class": lambda model: torch.nn.utils.parametrizations.weight_norm(model.blocks[1].linear),
}


def test_every_configuration_has_a_key_of_its_own(place: Path) -> None:
    keys = {}
    for what, change in {"nothing": lambda model: None, **CONFIGURATION}.items():
        model = made(place)
        change(model)
        keys[what] = key(model)
    same = [(a, b) for a in keys for b in keys if a < b and keys[a] == keys[b]]
    assert same in ([], [("nothing", "strides")]), "one row more or less than the order of parts"
    assert "" not in keys.values()


def test_what_is_asked_counts(place: Path) -> None:
    model = made(place)
    by_name = Call.of((), {"x": BATCH})[0]
    wide = torch.zeros(5, 4)
    keys = [
        key(model),
        key(model, 2),
        key(model, 3),
        key(model, 2, ("a",)),
        key(model, 2, ("b",)),
        key(model, 2.0),
        key(model, batch=wide),
        key(model, batch=BATCH.double()),
        key(model, batch=BATCH.t()),
        key(model, call=by_name),
    ]
    assert len(set(keys)) == len(keys)
    assert key(model) == key(model, batch=BATCH + 1)


def test_versions_and_flags_count(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(place)
    keys = [key(model)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        keys.append(key(model))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version", "4.0")
        keys.append(key(model))
    with monkeypatch.context() as patch:
        (place / "packages" / "other-1.0.dist-info").mkdir(parents=True)
        patch.setattr(sys, "path", [*sys.path, str(place / "packages")])
        keys.append(key(model))
    with torch.autocast("cpu"):
        keys.append(key(model))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        keys.append(key(model))
    try:
        torch.set_default_dtype(torch.float64)
        keys.append(key(model))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(set(keys)) == len(keys)
    assert key(model) == keys[0]


# -- no key ------------------------------------------------------------------------------------------------------------------------


class Odd:
    """An object whose attributes raise."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("not for you")


UNKNOWN: dict[str, Callable[[], object]] = {
    "a lock": threading.Lock,
    "a generator": lambda: (one for one in ()),
    "a generator of numbers": torch.Generator,
    "an object that raises": Odd,
    "a set of objects": lambda: {torch.relu},
    "a meta tensor": lambda: torch.empty(1, device="meta"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_cannot_be_described_has_no_key(what: str, place: Path) -> None:
    model = made(place)
    vars(model)["more"] = UNKNOWN[what]()
    assert key(model) == ""


def test_code_without_a_file_has_no_key() -> None:
    """As that of a notebook."""
    module = ModuleType("key_notebook")
    sys.modules["key_notebook"] = module
    try:
        exec("from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x\n", vars(module))
        assert key(module.Net()) == ""
    finally:
        del sys.modules["key_notebook"]
