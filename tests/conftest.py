"""Every test runs with one thread, as a stage does, and leaves this process as it found it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tyro._parsers import ParserSpecification

from delock.cli import arguments

from commands import Program
from leftovers import State
from ranks import Pids, alive

# A background job ignores Ctrl-C from birth, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Every test traces its models itself, and in the programs that it starts, unless it asks for kept traces.
os.environ["DELOCK_TRACE_CACHE"] = "0"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """One thread everywhere, so that sums are taken in the same order; afterwards this process is as it was."""
    torch.set_num_threads(1)
    before = State()
    yield
    assert not before.changed(), f"the test left behind or changed: {', '.join(before.changed())}"


@pytest.fixture(autouse=True, scope="session")
def forms_kept() -> Iterator[None]:
    """The form of a command with the same defaults is read once: tyro takes a third of a second for it, at every call of `main`."""
    forms, parsers = dict[str, Any](), dict[Any, Any]()
    make, read = arguments._form, ParserSpecification.from_callable_or_type

    def form(config: Any) -> Any:
        name = repr((type(config), config))
        return forms.get(name) or forms.setdefault(name, make(config))

    def parser(f: Any, description: Any = None, **given: Any) -> Any:
        if getattr(f, "__origin__", None) not in forms.values():
            return read(f, description=description, **given)  # type: ignore[misc]
        key = f.__origin__, description
        return parsers.get(key) or parsers.setdefault(key, read(f, description=description, **given))  # type: ignore[misc]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(arguments, "_form", form)
        patched.setattr(ParserSpecification, "from_callable_or_type", staticmethod(parser))
        yield


@pytest.fixture
def own_random() -> Iterator[None]:
    """A test that draws from the global generators gets the same numbers every time, and leaves no trace in them."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data is decoded and downloaded into a folder of the test's own."""
    monkeypatch.setenv("DELOCK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Traces are kept, in this folder of the test's own, which is not there yet."""
    monkeypatch.setenv("DELOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DELOCK_TRACE_CACHE")
    return tmp_path / "cache" / "traces"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a cache of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DELOCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


@pytest.fixture
def pids() -> Iterator[Pids]:
    """Afterwards none of the processes that reported their pid is alive."""
    reported = Pids()
    yield reported
    assert reported, "no rank reported its pid"
    assert [pid for pid in reported if alive(pid)] == []


@pytest.fixture
def start(here: Path) -> Iterator[Callable[..., Program]]:
    """Start programs; whatever comes, nothing of them is left."""
    programs: list[Program] = []

    def begin(*words: str, ignoring: bool = False) -> Program:
        programs.append(Program(*words, ignoring=ignoring))
        return programs[-1]

    yield begin
    for program in programs:
        if program.family():
            os.killpg(program.process.pid, signal.SIGKILL)
        program.process.communicate(timeout=20)
