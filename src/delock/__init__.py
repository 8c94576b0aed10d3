"""Delock: train one deep network on several workers depth-wise, without the locks of backpropagation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from delock import codecs, methods, options, plan, records, timeline
from delock.codecs import BF16, INT8, VQ
from delock.errors import DelockError, StageFailed, UsageError
from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, METHODS, AsyncDGL, GPipe, Interlocking, Method, OneFOneB
from delock.options import Compression, Execution, Placement, Report, Simulation
from delock.records import Result
from delock.timeline import Emulation, Slowdown

if TYPE_CHECKING:
    from delock import data, draw, nets, recipes
    from delock.api import fit

__version__ = "0.1.0"

__all__ = [
    "ADL",
    "BF16",
    "BP",
    "DDG",
    "DGL",
    "DSP",
    "FDG",
    "FR",
    "INT8",
    "METHODS",
    "VQ",
    "AsyncDGL",
    "Compression",
    "DelockError",
    "Emulation",
    "Execution",
    "GPipe",
    "Interlocking",
    "Method",
    "OneFOneB",
    "Placement",
    "Report",
    "Result",
    "Simulation",
    "Slowdown",
    "StageFailed",
    "UsageError",
    "codecs",
    "data",
    "draw",
    "fit",
    "methods",
    "nets",
    "options",
    "plan",
    "recipes",
    "records",
    "timeline",
]


def __getattr__(name: str) -> Any:
    """Loads what needs torch, or is seldom used, when it is first asked for; `import delock` loads neither."""
    if name == "fit":
        return importlib.import_module("delock.api").fit
    if name in ("data", "draw", "nets", "recipes"):
        return importlib.import_module(f"delock.{name}")
    raise AttributeError(f"module 'delock' has no attribute {name!r}")
