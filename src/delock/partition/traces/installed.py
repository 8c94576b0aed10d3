"""Tells code that is installed, and counts by the version of its package, from code of the user, which counts by what it says."""

from __future__ import annotations

import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

OWN = Path(__file__).resolve().parents[2]


class UndescribedError(Exception):
    """Raised for a value of which nobody can say that it is the same again."""


class Installed:
    """Knows the folders that packages are installed into, and Python's own."""

    def __init__(self) -> None:
        ways = ("stdlib", "platstdlib", "purelib", "platlib")
        found = [*map(sysconfig.get_path, ways), *site.getsitepackages(), site.getusersitepackages()]
        self.folders = tuple(f"{Path(one).resolve()}/" for one in found if one)
        self.known = dict.fromkeys(("delock", *sys.builtin_module_names), True)

    def __call__(self, module: ModuleType) -> bool:
        """Returns True for a module of an installed package, of Python or of this package."""
        name = module.__name__
        if name.startswith("delock."):
            return True
        if name not in self.known:
            file = getattr(module, "__file__", None) or getattr(getattr(module, "__spec__", None), "origin", None)
            self.known[name] = file == "frozen" or self.holds(file)
        return self.known[name]

    def holds(self, file: str | None) -> bool:
        """Returns True for a file in one of the folders."""
        return file is not None and str(Path(file).resolve()).startswith(self.folders)

    def is_patched(self, value: object) -> bool:
        """Returns True for a function of the user's, which in an installed package stands in for another one."""
        module = sys.modules.get(str(value.__globals__.get("__name__"))) if isinstance(value, FunctionType) else None
        return module is not None and not self(module)

    def imported(self, name: str, package: str) -> ModuleType | None:
        """Returns a module that code imports when it runs; None for an installed one to be loaded. Raises UndescribedError for others."""
        for full in (name, f"{package}.{name}"):
            if full in sys.modules:
                return sys.modules[full]
        top = importlib.util.find_spec(name.partition(".")[0]) if name else None
        if top is None or not self.holds(top.origin):
            raise UndescribedError(f"the module {name} is loaded later")
        return None

    def distributions(self) -> Iterator[str]:
        """Yields names and versions of all that is installed, as their folders have them."""
        for folder in sorted({*map(str, sys.path), *self.folders}):
            if Path(folder).is_dir():
                yield from sorted(one.name for one in Path(folder).iterdir() if one.suffix in (".dist-info", ".egg-info"))


def home(function: FunctionType) -> ModuleType:
    """Returns the module in which a function looks its names up. Raises UndescribedError if it is none."""
    found = sys.modules.get(str(function.__globals__.get("__name__")))
    if found is None or vars(found) is not function.__globals__:
        raise UndescribedError(f"{function.__qualname__} has names of its own")
    return found


def own_source() -> Iterator[bytes]:
    """Yields the files of this package."""
    for path in sorted(OWN.rglob("*.py")):
        yield path.read_bytes()
