"""Checks the numbers that optimizers and schedules are given, when they are made."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from numbers import Real
from typing import Any

from torch import Tensor

from delock.errors import UsageError


def check_optimizer(options: Mapping[str, Any]) -> None:
    """Raises UsageError for options of an optimizer outside their range; a rate may be a tensor of one number."""
    rate = options.get("lr", 0.0)
    check_amount("lr", rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate)
    for name in ("tau", "r", "eps", "weight_decay", "rest"):
        check_amount(name, options.get(name, 0.0))
    betas = options.get("betas", (0.0, 0.0))
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise UsageError(f"betas of an optimizer are two numbers in [0, 1), as (0.9, 0.99), not {reprlib.repr(betas)}")
    for value in (*betas, options.get("momentum", 0.0)):
        if not (_is_number(value) and 0 <= value < 1):
            raise UsageError(f"a momentum or beta of an optimizer lies in [0, 1), not at {reprlib.repr(value)}")


def check_fields(factory: Any) -> None:
    """Does so for the options of a factory, a dataclass."""
    check_optimizer({one.name: getattr(factory, one.name) for one in fields(factory)})


def check_amount(name: str, value: Any, of: str = "an optimizer") -> None:
    """Raises UsageError unless a value is a number from 0 on, and finite."""
    if not is_amount(value):
        raise UsageError(f"{name} of {of} is a number from 0 on, not {reprlib.repr(value)}")


def is_amount(value: Any) -> bool:
    """Returns True for a finite number from 0 on."""
    return _is_number(value) and bool(0 <= value < math.inf)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
