"""Facts of a stage that a factory may ask for: its place in the chain, and the staleness of its gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StageFacts:
    """The place of a stage, and its staleness in updates once the pipeline is warm.

    staleness: tau_k, the mean age of the Forward's weights at the moment when the gradient is applied. It is a real number and is never
    rounded: with the parts of a batch it lies below 1, and a rounded one would switch every remedy off.
    """

    k: int
    K: int
    staleness: float
    max_staleness: int


ALONE = StageFacts(0, 1, 0.0, 0)
"""Facts of a network in one stage."""


def for_stage(factory: Callable[..., T], facts: StageFacts) -> Callable[..., T]:
    """Returns the factory with the facts filled in where it has a keyword-only parameter named `stage`, else the factory itself."""
    return partial(factory, stage=facts) if _asks(factory) else factory


def _asks(factory: Callable[..., Any]) -> bool:
    if isinstance(factory, partial):  # its signature would show parameters after a bound one as keyword-only
        return "stage" not in factory.keywords and _asks(factory.func)
    try:
        wanted = inspect.signature(factory).parameters.get("stage")
    except ValueError:  # written in C: it has none
        return False
    return wanted is not None and wanted.kind is wanted.KEYWORD_ONLY
