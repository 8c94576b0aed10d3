"""Delock: train one deep network on several workers depth-wise, without the locks of backpropagation."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from delock import methods, records
from delock.errors import DelockError, StageFailed, UsageError
from delock.methods import (
    ADL,
    BP,
    DDG,
    DGL,
    DSP,
    FDG,
    FR,
    METHODS,
    PACI,
    ZB1P,
    AsyncDGL,
    GPipe,
    Interlocking,
    Method,
    OneFOneB,
    PipeDream2BW,
)
from delock.records import Result

if TYPE_CHECKING:
    from delock import codecs, data, draw, nets, optim, options, plan, recipes, timeline
    from delock.api import evaluate, fit, session
    from delock.codecs import BF16, INT8, VQ
    from delock.draw.progress_bar import ProgressBar
    from delock.nets.cut_point import CutPoint
    from delock.options import EMA, Compression, EarlyStopping, Execution, KeepBest, Placement, Report, Simulation
    from delock.timeline import Emulation, Slowdown

__version__ = "0.1.0"

__all__ = [
    "ADL",
    "BF16",
    "BP",
    "DDG",
    "DGL",
    "DSP",
    "EMA",
    "FDG",
    "FR",
    "INT8",
    "METHODS",
    "PACI",
    "VQ",
    "ZB1P",
    "AsyncDGL",
    "Checkpoint",
    "Compression",
    "CutPoint",
    "DelockError",
    "EarlyStopping",
    "Emulation",
    "Execution",
    "GPipe",
    "Interlocking",
    "KeepBest",
    "Method",
    "OneFOneB",
    "PipeDream2BW",
    "Placement",
    "ProgressBar",
    "Report",
    "Result",
    "Simulation",
    "Slowdown",
    "StageFailed",
    "UsageError",
    "codecs",
    "data",
    "draw",
    "evaluate",
    "fit",
    "methods",
    "nets",
    "optim",
    "options",
    "plan",
    "recipes",
    "records",
    "session",
    "timeline",
]


LATER = MappingProxyType(
    {
        **dict.fromkeys(("BF16", "INT8", "VQ"), "delock.codecs"),
        **dict.fromkeys(
            ("EMA", "Checkpoint", "EarlyStopping", "KeepBest", "Compression", "Execution", "Placement", "Report", "Simulation"),
            "delock.options",
        ),
        **dict.fromkeys(("Emulation", "Slowdown"), "delock.timeline"),
        "CutPoint": "delock.nets.cut_point",
        "ProgressBar": "delock.draw.progress_bar",
        "evaluate": "delock.api",
        "fit": "delock.api",
        "session": "delock.api",
    }
)
"""Names that are loaded when they are first used, and their modules: `import delock` takes little time, and loads no torch."""


def __getattr__(name: str) -> Any:
    """Returns a name of LATER, or a module that the package offers."""
    if name in LATER:
        return getattr(importlib.import_module(LATER[name]), name)
    if name in __all__:
        return importlib.import_module(f"delock.{name}")
    raise AttributeError(f"module 'delock' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns what the package offers, loaded or not: notebooks complete names by it."""
    return sorted(__all__)
