"""Lists all methods in the table METHODS; a new method is one class and one row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from delock.errors import UsageError
from delock.methods.adl import ADL
from delock.methods.base import Method
from delock.methods.delayed import DDG, FR
from delock.methods.dgl import DGL
from delock.methods.dgl_async import AsyncDGL
from delock.methods.dsp import DSP
from delock.methods.fdg import FDG
from delock.methods.interlocking import Interlocking
from delock.methods.paci import PACI
from delock.methods.pipedream_2bw import PipeDream2BW
from delock.methods.synchronous import BP, GPipe, OneFOneB
from delock.methods.zero_bubble import ZB1P

_ALL = (BP, GPipe, OneFOneB, ZB1P, DDG, FR, FDG, ADL, DSP, PipeDream2BW, PACI, DGL, AsyncDGL, Interlocking)
METHODS: Mapping[str, type[Method]] = MappingProxyType({**{method.name: method for method in _ALL}, "pipedream": DDG})
"""Methods by name. pipedream, 1F1B without a flush, is another name of ddg (Narayanan et al., SOSP 2019); records and files say ddg."""


def options(method: type[Method]) -> list[str]:
    """Returns the names of a method's options."""
    return [field.name for field in fields(method)]  # type: ignore[arg-type]


def spelled(method: Method) -> str:
    """Returns the method as one would write it, without options at their defaults: adl(accumulate=4)."""
    default = type(method)()
    changed = [f"{name}={getattr(method, name)}" for name in options(type(method)) if getattr(method, name) != getattr(default, name)]
    return method.name + (f"({', '.join(changed)})" if changed else "")


def make(name: str, **given: Any) -> Method:
    """Returns the method `name` with these options. Raises UsageError, with the nearest name, for an unknown method or option."""
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}{_nearest(name, list(METHODS))} (there are {', '.join(METHODS)})")
    METHODS[name].refuse_renamed(given)
    known = options(METHODS[name])
    for option in given:
        if option not in known:
            takes = f"its options are {', '.join(known)}" if known else "it has none"
            raise UsageError(f"{name} has no option {option!r}{_nearest(option, known)} ({takes})")
    return METHODS[name](**given)


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


__all__ = [
    "ADL",
    "BP",
    "DDG",
    "DGL",
    "DSP",
    "FDG",
    "FR",
    "METHODS",
    "PACI",
    "ZB1P",
    "AsyncDGL",
    "GPipe",
    "Interlocking",
    "Method",
    "OneFOneB",
    "PipeDream2BW",
    "make",
    "options",
    "spelled",
]
