"""Error feedback: any optimizer, corrected by the difference between its update now and its update tau updates ago."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from delock.errors import UsageError
from delock.optim.factories import Named, refuse_class
from delock.optim.ranges import check_amount, is_amount
from delock.optim.several import Several
from delock.optim.stage_facts import ALONE, StageFacts, for_stage

TWICE = "error feedback around error feedback would correct one staleness twice: give it an optimizer without, with the whole tau"


class ErrorFeedback(Several):
    """Wraps an optimizer `base` whose gradients are tau updates old:

        w <- w - u_n - c (u_n - u_{n-tau})

    u_n is the whole change that the base makes at its update n, learning rate and weight decay included. The first ceil(tau) updates are
    the base's own. Source: Zmushko et al., ICML 2026, with c = 1 and tau = 1.

    Deviation: tau is any real number, and u_{n-tau} lies on the line between its two neighbours: with i = floor(tau) and f = tau - i it is
    (1-f) u_{n-i} + f u_{n-i-1}. So for tau < 1 the update is w - u_n - c tau (u_n - u_{n-1}).
    It keeps ceil(tau) + 1 changes, each as large as the weights, in their dtype. A change is found as a difference of weights: weights in
    half precision would leave little of it.
    """

    def __init__(self, base: Optimizer, *, tau: float, c: float = 1.0) -> None:
        if not is_amount(tau) or tau == 0:
            raise UsageError(f"error feedback corrects a staleness above 0, not one of {tau!r}: use the optimizer without it")
        check_amount("c", c, "error feedback")
        if _corrects(base):
            raise UsageError(TWICE)
        super().__init__([base])
        self.tau, self.c = tau, c

    def update(self) -> None:
        """Lets the base update every weight that has a gradient, then corrects its change."""
        if weights := [w for group in self.param_groups for w in group["params"] if w.grad is not None]:
            self._update(weights)

    def _update(self, weights: list[Tensor]) -> None:
        changes = [self._spare(w) for w in weights]
        torch._foreach_copy_(changes, weights)
        super().update()
        torch._foreach_sub_(changes, weights)  # u_n: before less after
        kept = [self.state[w].setdefault("changes", []) for w in weights]  # after the base's step: a base may ask if its state is empty
        for change, earlier in zip(changes, kept, strict=True):
            earlier.insert(0, change)
        self._correct([(w, u) for w, u in zip(weights, kept, strict=True) if len(u) > math.ceil(self.tau)])

    def _spare(self, weight: Tensor) -> Tensor:
        """Returns room for a change: that of the oldest, if it is not needed any more."""
        kept = self.state[weight].get("changes", ())
        while len(kept) > math.ceil(self.tau) + 1:  # of a loaded state with a larger tau
            kept.pop()
        return kept.pop() if len(kept) > math.ceil(self.tau) else torch.empty_like(weight)

    def _correct(self, ready: list[tuple[Tensor, list[Tensor]]]) -> None:
        """w <- w - c (u_n - u_{n-tau}), for weights with their changes u_n, u_{n-1}, ..."""
        for ago, factor in _factors(self.tau) if ready else ():
            torch._foreach_add_([w for w, _ in ready], [u[ago] for _, u in ready], alpha=self.c * factor)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "tau": self.tau, "c": self.c}


def _corrects(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, ErrorFeedback) or (isinstance(optimizer, Several) and any(map(_corrects, optimizer.optimizers)))


def _factors(tau: float) -> list[tuple[int, float]]:
    """Returns the number of updates ago, and the factor, of every change in u_{n-tau} - u_n."""
    whole = math.floor(tau)
    part = tau - whole
    factors = [(0, -1.0), (whole, 1 - part)] if whole else [(0, -part)]
    return factors + [(whole + 1, part)] * (part > 0)


@dataclass(frozen=True, slots=True)
class error_feedback:
    """Makes the base optimizer, and where its stage has a staleness, wraps it in ErrorFeedback. The base may ask for the stage, too."""

    base: Callable[..., Optimizer]
    c: float = 1.0

    def __post_init__(self) -> None:
        check_amount("c", self.c, "error feedback")
        refuse_class("base of error_feedback", self.base)
        if not callable(self.base):
            kind = type(self.base).__name__
            raise UsageError(f"base of error_feedback is a factory, as delock.recipes.AdamW(1e-3), and not an object of {kind}")
        if isinstance(self.base, error_feedback):
            raise UsageError(TWICE)

    def __call__(self, params: Any, *, stage: StageFacts = ALONE) -> Optimizer:
        base = for_stage(self.base, stage)(params)
        return ErrorFeedback(base, tau=stage.staleness, c=self.c) if stage.staleness else base

    def own_bytes(self, named: Named, *, stage: StageFacts = ALONE) -> int:
        """Returns the bytes of the changes that it keeps, beside the base's state."""
        return (math.ceil(stage.staleness) + 1) * sum(w.nbytes for _, w in named) if stage.staleness else 0
