"""Loads a file of the user's, and calls the function in it that the command line names.

The file's folder goes first in the path on which Python finds modules, as if a program in it ran, and the file is imported under its own
name. A stage's process gets the path of this one, and so finds the module, and those beside it, as it rebuilds what refers to them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from delock.cli.models.kept_files import checksum
from delock.cli.models.names import split
from delock.errors import DelockError, UsageError, said

SUM = "__delock_crc32__"  # of the file that a module was imported from


def function(name: str) -> Callable[..., Any]:
    """Returns the function that FILE.py:FUNCTION names. Raises UsageError for a file or a function that is not there."""
    path, called = split(name)
    module = load(path)
    found = getattr(module, called, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    own = [one for one, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
    near = get_close_matches(called, own, n=1, cutoff=0.0)
    raise UsageError(f"{path} has no function {called!r}: " + (f"did you mean {near[0]!r}?" if near else "define one in it"))


def call(name: str, given: Mapping[str, object]) -> Any:
    """Returns what the function of FILE.py:FUNCTION returns; of what is given it gets what it takes, by keyword.

    Raises UsageError if it takes something else without a default, and if it raises.
    """
    called = function(name)
    takes = inspect.signature(called).parameters
    by_name = {one.name for one in takes.values() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    rest = any(one.kind == one.VAR_KEYWORD for one in takes.values())
    missing = [one for one in takes if takes[one].default is inspect.Parameter.empty and one in by_name and one not in given]
    if missing:
        offer = ", ".join(given) or "nothing"
        raise UsageError(f"{name} takes {missing[0]!r}, which is not known here: give it a default (known are {offer})")
    try:
        return called(**{one: value for one, value in given.items() if rest or one in by_name})
    except DelockError:
        raise
    except Exception as error:
        raise UsageError(f"{name} failed: {said(error)}") from error


def takes(name: str, argument: str) -> bool:
    """Returns True if the function of FILE.py:FUNCTION takes this argument by keyword."""
    parameters = inspect.signature(function(name)).parameters
    return argument in parameters or any(one.kind == one.VAR_KEYWORD for one in parameters.values())


def load(path: Path) -> ModuleType:
    """Returns the module of a file, imported afresh if the file has changed since. Raises UsageError if it cannot be imported."""
    if not path.is_file():
        raise UsageError(f"there is no file {path} here ({Path.cwd()}): give its path, or go to the folder that it is relative to")
    path = path.resolve()
    name, now = path.stem, checksum(path)
    if not name.isidentifier():
        raise UsageError(f"{path.name} cannot be imported, because {name!r} is no name in Python: rename the file")
    loaded = sys.modules.get(name)
    if loaded is not None and hasattr(loaded, SUM):
        if getattr(loaded, SUM) == now and loaded.__file__ == str(path):
            return loaded
        del sys.modules[name]  # of an earlier command in this process
    folder = str(path.parent)
    _refuse_taken(name, path)
    sys.path[:] = [folder, *(one for one in sys.path if one != folder)]
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except SyntaxError as error:
        raise UsageError(
            f"{path.name} cannot be imported: {error.msg} ({Path(error.filename or name).name}, line {error.lineno})"
        ) from error
    except Exception as error:
        raise UsageError(f"{path.name} cannot be imported: {said(error)}") from error
    setattr(module, SUM, now)
    return module


def _refuse_taken(name: str, path: Path) -> None:
    """Raises UsageError if another module has the name of the user's file, so that one of them would stand for both."""
    other = sys.modules.get(name)
    at = getattr(other, "__file__", None) if other else getattr(importlib.util.find_spec(name), "origin", None)
    if (other or at) and (at is None or Path(at).resolve() != path):
        raise UsageError(f"{path.name} has the name of another module, {name} ({at or 'of Python'}): rename the file")
