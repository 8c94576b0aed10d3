"""Several optimizers behind one: one state, one schedule, saved and loaded as one."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from delock.errors import UsageError
from delock.optim.closures import loss_of

CHANGED = "an optimizer inside another one was given other groups, which the outer one does not see: load states into the outer one alone"


class Several(Optimizer):
    """Steps several optimizers of different weights as one.

    Its parameter groups are those of all, in order, and they are the same dicts: a schedule that sets the rate of a group here sets it
    there. State is shared in the same way. So `state_dict` and `load_state_dict` are torch's own and cover every part. Groups may be added
    to a part before it is given to Several, not afterwards.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = _made(optimizers, type(self).__name__)
        super().__init__([group for one in self.optimizers for group in one.param_groups], self._common())
        for one in self.optimizers:
            self.state.update(one.state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps each of them; a closure is evaluated once."""
        loss = loss_of(closure)
        self.update()
        return loss

    def update(self) -> None:
        """Updates all weights. A subclass overrides this and not `step`: torch wraps `step` of every class in the hooks of an object."""
        own = [group for one in self.optimizers for group in one.param_groups]
        if list(map(id, own)) != list(map(id, self.param_groups)):
            raise UsageError(CHANGED)
        for one in self.optimizers:
            one.step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes the groups of its parts, and no other: it could not know which of them is to step it."""
        if not any(param_group is group for one in self.optimizers for group in one.param_groups):
            name = type(self).__name__
            raise UsageError(f"{name} does not know which optimizer inside it is to step a new group: add it to that one, then make {name}")
        super().add_param_group(param_group)

    def _common(self) -> dict[str, Any]:
        """Returns the defaults that all parts have: by these a schedule that moves a momentum knows if there is one."""
        first, *others = [one.defaults for one in self.optimizers]
        return {name: value for name, value in first.items() if all(name in other for other in others)}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of a copy, or a loaded one, and hands every part its own groups."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        if sum(len(one.param_groups) for one in self.optimizers) != len(self.param_groups):
            raise UsageError(CHANGED)
        groups = iter(self.param_groups)
        for one in self.optimizers:
            one.__setstate__({"state": self.state, "param_groups": [next(groups) for _ in one.param_groups]})


def _made(given: object, around: str) -> tuple[Optimizer, ...]:
    """Returns optimizers as a tuple. Raises UsageError for anything else, and for one whose step needs a closure."""
    found = tuple(given) if isinstance(given, Sequence) else ()
    if not found or not all(isinstance(one, Optimizer) for one in found):
        raise UsageError(f"{around} goes around optimizers that are made, as AdamW(model.parameters()), not around {reprlib.repr(given)}")
    if any(isinstance(one, LBFGS) for one in found):
        raise UsageError(f"LBFGS computes the loss several times within one step, which {around} cannot: use another optimizer")
    return found
