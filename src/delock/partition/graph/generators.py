"""Notices numbers that a model draws at random while it is traced: its graph would repeat that one draw for ever."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from delock.partition.graph.refusals import OWN, quoted
from delock.partition.traces.installed import Installed

Generator: TypeAlias = random.Random | np.random.RandomState | np.random.Generator | torch.Generator
KINDS = frozenset((random.Random, np.random.RandomState, np.random.Generator, torch.Generator))
DEPTH = 3  # containers and objects within an attribute that are looked into
PASSED = (*OWN, str(Path(np.__file__).parent))  # code that draws for others, and Python's own
PYTHON = str(Path(random.__file__).parent)


class Generators:
    """Holds generators with their states: the global ones of torch, numpy and Python, and with a model those that its code can reach.

    These are attributes of its modules and of their classes, and globals of files of the user. own: further ones.
    """

    def __init__(self, model: nn.Module | None = None, own: Iterable[Generator] = ()) -> None:
        owners: tuple[Any, ...] = (np.random.rand, random.random)
        found = [torch.default_generator, *torch.cuda.default_generators, *(one.__self__ for one in owners), *own]
        found += [*_of_model(model), *_of_files()] if model else []
        self.held = [(one, _state(one)) for one in {id(one): one for one in found}.values()]

    def moved(self) -> bool:
        """Returns True if one of them has drawn since."""
        return not all(_equal(state, _state(one)) for one, state in self.held)

    def put_back(self) -> None:
        """Gives them the states that they had."""
        for one, state in self.held:
            _set(one, state)


@contextlib.contextmanager
def generators_kept(model: nn.Module) -> Iterator[None]:
    """Lets draws within the block leave no trace in the global generators, and in those that the model's code can reach."""
    before = Generators(model)
    try:
        yield
    finally:
        before.put_back()


def line_that_draws(draws: Generators, run: Callable[[], object]) -> str:
    """Returns the line of the user's code at which one of the generators draws when this runs; "" if there is none."""
    draws.put_back()
    look = _Look(draws)
    before = sys.gettrace()
    sys.settrace(look)
    try:
        with contextlib.suppress(Exception):
            run()
    finally:
        sys.settrace(before)
    return look.found


class _Look:
    """Looks at the generators before every line of the user's code. found: the line before that, once they have moved."""

    def __init__(self, draws: Generators) -> None:
        self.draws, self.found = draws, ""
        self.at: dict[FrameType, int] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if self.found or _draws_for_others(frame.f_code.co_filename):
            return None
        if self.draws.moved():
            self._find(frame.f_back if event == "call" else frame)
        self.at[frame] = frame.f_lineno
        return self

    def _find(self, frame: FrameType | None) -> None:
        while frame is not None and not self.found:
            self.found = quoted(frame.f_code.co_filename, self.at[frame]) if frame in self.at else ""
            frame = frame.f_back


def _draws_for_others(file: str) -> bool:
    return file.startswith(PASSED) or (file.startswith(PYTHON) and "-packages" not in file)


def _of_model(model: nn.Module) -> Iterator[Generator]:
    seen: set[int] = set()
    for module in model.modules():
        for held in (vars(module), *(vars(one) for one in type(module).__mro__ if one not in nn.Module.__mro__)):
            yield from _inside(held.values(), DEPTH, seen)


def _of_files() -> Iterator[Generator]:
    """Yields the globals of files that are not installed."""
    installed = Installed()
    for module in list(sys.modules.values()):
        found = [one for one in list(getattr(module, "__dict__", {}).values()) if is_generator(one)]
        if found and not installed(module):
            yield from found


def _inside(values: Iterable[Any], depth: int, seen: set[int]) -> Iterator[Generator]:
    for one in values:
        if is_generator(one):
            yield one
        elif depth and id(one) not in seen and not isinstance(one, Tensor | nn.Module | type | FunctionType | ModuleType):
            seen.add(id(one))
            inside = one if isinstance(one, dict | list | tuple) else getattr(one, "__dict__", {})
            yield from _inside(list(inside.values() if isinstance(inside, Mapping) else inside), depth - 1, seen)


def is_generator(one: object) -> TypeGuard[Generator]:
    """Returns True for a generator, without a question to the object itself: some answer with a warning."""
    return not KINDS.isdisjoint(type(one).__mro__)


def _state(one: Generator) -> Any:
    match one:
        case random.Random():
            return one.getstate()
        case np.random.RandomState():
            return one.get_state(legacy=False)
        case np.random.Generator():
            return one.bit_generator.state
    return one.get_state()


def _set(one: Generator, state: Any) -> None:
    match one:
        case random.Random():
            one.setstate(state)
        case np.random.Generator():
            one.bit_generator.state = state
        case _:
            one.set_state(state)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_equal(value, b[name]) for name, value in a.items())
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)
