"""Provides optimizers and learning rates, and the factories by which every stage makes its own; `delock.recipes` has the factories."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from delock.optim.stage_facts import StageFacts

if TYPE_CHECKING:
    from delock.optim.feedback import ErrorFeedback as ErrorFeedback
    from delock.optim.several import Several as Several
    from delock.optim.spike import SCSGD as SCSGD
    from delock.optim.spike import SCAdamW as SCAdamW

__all__ = ["SCSGD", "ErrorFeedback", "SCAdamW", "Several", "StageFacts"]


def __getattr__(name: str) -> Any:
    """The optimizers load torch when they are first used; the facts of a stage, which a plan gives, do not."""
    places = {"ErrorFeedback": "feedback", "Several": "several", "SCSGD": "spike", "SCAdamW": "spike"}
    if name in places:
        return getattr(importlib.import_module(f"delock.optim.{places[name]}"), name)
    raise AttributeError(f"module 'delock.optim' has no attribute {name!r}")
