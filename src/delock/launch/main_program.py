"""Keeps the main program, a script or a notebook, from being run again in the processes that are started.

What they need goes by value, and the modules that the program has imported are imported there: they may register or change things.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from multiprocessing import reduction
from types import ModuleType
from typing import Any

from delock.launch.by_value import MAIN, ByValue


def never_run_again() -> None:
    """Lets no process that this one starts afresh, such as a loader's worker, import the main program.

    multiprocessing leaves out a main program that is a package's own `__main__`.
    """
    sys.modules[MAIN].__spec__ = ModuleSpec("delock.__main__", None)
    reduction.dump = _dump


@contextmanager
def not_run_again() -> Iterator[None]:
    """Does the same within the block."""
    main = sys.modules[MAIN]
    before = getattr(main, "__spec__", None), reduction.dump
    never_run_again()
    try:
        yield
    finally:
        main.__spec__, reduction.dump = before


class Imports:
    """Names the modules that the main program has, or has something of; where this arrives, they are imported."""

    def __init__(self) -> None:
        found = (
            one.__name__ if isinstance(one, ModuleType) else getattr(one, "__module__", None) for one in vars(sys.modules[MAIN]).values()
        )
        self.names = [name for name in dict.fromkeys(found) if isinstance(name, str) and _can_be_imported(name)]

    def __reduce__(self) -> Any:
        return import_all, (self.names,)


def import_all(names: list[str]) -> None:
    """Imports modules; one that this process does not find is missed where it is used."""
    for name in names:
        with suppress(ImportError):
            import_module(name)


def _can_be_imported(name: str) -> bool:
    known = getattr(sys.modules.get(name), "__spec__", None)
    return known is not None and name.partition(".")[0] not in (MAIN, "delock")


def _dump(obj: Any, file: Any, protocol: int | None = None) -> None:
    """Pickles for a process that is about to start, as multiprocessing and torch do, but by value."""
    reducers: Any = vars(reduction.ForkingPickler)["_extra_reducers"]
    ByValue(file, reducers).dump(obj)
