"""Delock: train one deep network on several workers depth-wise, without the locks of backpropagation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from delock.errors import DelockError, StageFailed, UsageError
from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, METHODS, AsyncDGL, GPipe, Interlocking, Method, OneFOneB
from delock.records import Result

if TYPE_CHECKING:
    from delock.api import fit as fit

__version__ = "0.1.0"

__all__ = [
    "ADL",
    "BP",
    "DDG",
    "DGL",
    "DSP",
    "FDG",
    "FR",
    "METHODS",
    "AsyncDGL",
    "DelockError",
    "GPipe",
    "Interlocking",
    "Method",
    "OneFOneB",
    "Result",
    "StageFailed",
    "UsageError",
    "fit",
]


def __getattr__(name: str) -> Any:
    """`delock.fit` loads torch when it is first used, `import delock` does not."""
    if name == "fit":
        return importlib.import_module("delock.api").fit
    raise AttributeError(f"module 'delock' has no attribute {name!r}")
