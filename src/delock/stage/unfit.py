"""Refuses an optimizer or a schedule that would train a stage wrongly, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from delock.errors import DelockError, UsageError, said
from delock.optim.objects import OptimizerLike

T = TypeVar("T")


def made_by(factory: Callable[[Any], T], given: Any, what: str, k: int) -> T:
    """Returns factory(given). Raises UsageError for whatever the factory raises; what: "optimizer" or "schedule"; k: of the stage."""
    try:
        return factory(given)
    except (torch.OutOfMemoryError, DelockError):
        raise
    except Exception as error:
        raise UsageError(f"the {what} factory {_called(factory)} fails at stage {k}: {said(error)}; correct its arguments") from error


def _called(factory: object) -> str:
    """Returns a factory in words, as it is written: "SGD(lr=-1)"."""
    if isinstance(factory, partial):
        options = [f"{name}={value!r}" for name, value in factory.keywords.items() if name != "stage"]  # its facts: Delock's own
        inner, given = _called(factory.func), ", ".join([*map(repr, factory.args), *options])
        return f"{inner}({given})" if given else inner
    return str(getattr(factory, "__qualname__", type(factory).__name__ if "object at 0x" in repr(factory) else repr(factory)))


def refuse_unfit_optimizer(made: object, named: Sequence[tuple[str, Tensor]], factory: object) -> None:
    """Raises UsageError unless a factory has made an optimizer of the weights that it was given, and of no others.

    One like an optimizer that was given may have none: that one holds a part of the model, and the rest does not learn.
    """
    names, own = [name for name, _ in named], {id(weight) for _, weight in named}
    where = f"for the parameters {names[0]} .. {names[-1]}" if len(names) > 1 else f"for the parameter {names[0]}"
    if not isinstance(made, Optimizer):
        kind = "None" if made is None else f"a {type(made).__name__}"
        raise UsageError(
            f"the optimizer factory returned {kind} {where}, but it must return a torch.optim.Optimizer of them, as "
            "functools.partial(torch.optim.SGD, lr=0.1) does"
        )
    if isinstance(made, LBFGS):
        raise UsageError("LBFGS computes the loss several times within one step, which a single stage cannot: use another optimizer")
    held = [one for group in made.param_groups for one in group["params"]]
    if foreign := [tuple(one.shape) for one in held if id(one) not in own]:
        raise UsageError(
            f"the optimizer that was made {where} holds a parameter of shape {foreign[0]} that is not among them, so it would not be "
            "trained: let the factory take its parameters from its argument alone, the (name, parameter) pairs of one stage"
        )
    if not held and not isinstance(factory, OptimizerLike):
        raise UsageError(
            f"the optimizer that was made {where} holds none of them, so the stage would not learn: give it parameters, or freeze those "
            "of the model with requires_grad_(False)"
        )


def refuse_unfit_schedule(made: object) -> None:
    """Raises UsageError unless a factory has made a schedule."""
    if isinstance(made, Optimizer) or not callable(getattr(made, "step", None)):
        kind = "None" if made is None else f"a {type(made).__name__}"
        raise UsageError(
            f"the schedule factory returned {kind}, but it must return a scheduler of torch.optim.lr_scheduler: leave schedule out for a "
            "rate that stays as it is"
        )
