"""Optimizers with spike compensation: a gradient that is late gets at once the weight that it would have had by now.

Under momentum a gradient acts over many updates, a share of it in each. If it comes tau updates late, it has missed the first ones; the
horizon s = r tau says how many are made up for in one spike. tau is the gradients' mean staleness in updates, a real number; where it is 0
the equations are those of torch's AdamW and SGD. Both classes are ordinary torch optimizers and serve outside Delock, too. Their state has
the names of torch's, so that a state dict of AdamW or of SGD with momentum can be loaded; tau and r stay this optimizer's.

Source: Kosson, Chiley, Venigalla, Hestness, Köster, "Pipelined Backpropagation at Scale: Training Large Models without Batches",
MLSys 2021, for SGD with momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from delock.errors import UsageError
from delock.optim.closures import loss_of
from delock.optim.factories import SGD, AdamW, Named, Params, decay_groups, two_means
from delock.optim.ranges import check_fields, check_optimizer
from delock.optim.stage_facts import ALONE, StageFacts

UNKNOWN = ("amsgrad", "maximize", "nesterov", "dampening")  # options of torch's AdamW and SGD


class SpikeCompensated(Optimizer):
    """Steps group by group; a subclass says what that is for the weights of a group that have a gradient."""

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        check_optimizer(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. Raises UsageError for options outside their range and weights that it does not take."""
        super().add_param_group(param_group)
        try:
            self.check_group(param_group)
        except UsageError:
            self.param_groups.pop()
            raise

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises UsageError for a group, with all its options, that cannot be stepped."""
        check_optimizer(group)
        if other := [name for name in UNKNOWN if group.get(name)]:
            raise UsageError(f"{type(self).__name__} has no {other[0]}: leave it out")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a copied or loaded state. Groups of torch's AdamW or SGD, which have no tau and no r, get those of this optimizer."""
        own = {**getattr(self, "defaults", {}), **state.get("defaults", {})}
        for group in state["param_groups"]:
            for name in ("tau", "r"):
                group.setdefault(name, own[name])
            self.check_group(group)
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every weight that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if weights:
                self.update(group, weights, [w.grad for w in weights])
        return loss

    def update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        """Updates the weights of one group."""
        raise NotImplementedError


class SCAdamW(SpikeCompensated):
    """AdamW with spike compensation, for gradients that are tau updates old:

        m <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g^2;   m^ = m / (1-b1^t);   v^ = v / (1-b2^t)
        d  = b1^s m^ + (1 - b1^s) g,    s = r tau
        w <- (1 - lr weight_decay) w - lr d / (sqrt(v^) + eps)

    g is the gradient, t = 1, 2, ... the number of the weight's update, (b1, b2) = betas. The source has SGD only (see the head of this
    file); this carries it over to Adam, with a horizon of r = 2 staleness, because Adam divides by a root that is as late as the gradient.
    r = 1 and tau = 1 give Nesterov's Adam, up to NAdam's own correction of the bias.
    A b1 of .98 or more helps only in long runs. Dense real gradients; no amsgrad.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        tau: float,
        r: float = 2.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "tau": tau, "r": r})

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises UsageError for a group, with all its options, that cannot be stepped."""
        super().check_group(group)
        if shapes := [tuple(w.shape) for w in group["params"] if w.is_complex()]:
            raise UsageError(f"SCAdamW takes real weights, and one of shape {shapes[0]} is complex: use torch.optim.AdamW")

    def update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        """Updates the weights of one group, in the order of torch's AdamW(foreach=True), to which it is equal where tau = 0."""
        refuse_sparse(grads, "SCAdamW")
        lr, (b1, b2) = float(group["lr"]), group["betas"]
        kept = b1 ** (group["r"] * group["tau"])
        states = [self._state(w) for w in weights]
        m, v, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
        t = [step.item() for step in steps]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)
        roots = torch._foreach_sqrt(v)
        torch._foreach_div_(roots, [(1 - b2**n) ** 0.5 for n in t])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(weights, m, roots, [-lr * kept / (1 - b1**n) for n in t])
        if kept < 1:
            torch._foreach_addcdiv_(weights, grads, roots, -lr * (1 - kept))

    def _state(self, weight: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state


class SCSGD(SpikeCompensated):
    """SGD with momentum and spike compensation, for gradients that are tau updates old:

        v <- momentum v + g + weight_decay w
        w <- w - lr (a v + b (g + weight_decay w)),    a = momentum^s,  b = (1 - momentum^s) / (1 - momentum),  s = r tau

    g is the gradient. Source: the paper at the head of this file, its SCD with the horizon as a real number. r tau = 1 is Nesterov's
    momentum.
    """

    def __init__(self, params: Params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, *, tau: float, r: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "tau": tau, "r": r})

    def update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        """Updates the weights of one group."""
        lr, mu = float(group["lr"]), group["momentum"]
        a = mu ** (group["r"] * group["tau"])
        if group["weight_decay"]:
            refuse_sparse(grads, "SCSGD with weight decay")
            grads = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        v = [self._momentum(w) for w in weights]
        torch._foreach_mul_(v, mu)
        torch._foreach_add_(v, grads)
        torch._foreach_add_(weights, v, alpha=-lr * a)
        if a < 1:
            torch._foreach_add_(weights, grads, alpha=-lr * (1 - a) / (1 - mu))

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def refuse_sparse(grads: list[Tensor], what: str) -> None:
    """Raises UsageError for a sparse gradient, as that of nn.Embedding(sparse=True)."""
    if any(grad.layout is not torch.strided for grad in grads):
        raise UsageError(f"{what} does not take sparse gradients: give embeddings sparse=False, or another optimizer")


@dataclass(frozen=True, slots=True)
class scadamw:
    """Makes SCAdamW for the staleness of its stage, torch's AdamW with the same betas where that is 0; decay as in recipes.AdamW."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.95, 0.99)
    weight_decay: float = 0.01
    r: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, params: Named, *, stage: StageFacts = ALONE) -> Optimizer:
        if stage.staleness == 0:
            return AdamW(self.lr, self.weight_decay, self.betas)(params)
        return SCAdamW(decay_groups(params, self.weight_decay), self.lr, self.betas, tau=stage.staleness, r=self.r)

    def bytes(self, named: Named, *, stage: StageFacts = ALONE) -> tuple[int, int]:
        """Returns bytes of its state, and peak bytes during a step, above that: the roots of the second moments."""
        named = list(named)
        return two_means(named), sum(w.nbytes for _, w in named) if stage.staleness else 0


@dataclass(frozen=True, slots=True)
class scsgd:
    """Makes SCSGD for the staleness of its stage, torch's SGD with the same momentum where that is 0."""

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    r: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, params: Params, *, stage: StageFacts = ALONE) -> Optimizer:
        if stage.staleness == 0:
            return SGD(self.lr, self.momentum, self.weight_decay)(params)
        return SCSGD(params, self.lr, self.momentum, self.weight_decay, tau=stage.staleness, r=self.r)

    def bytes(self, named: Named, *, stage: StageFacts = ALONE) -> tuple[int, int]:
        """Returns bytes of its state, and peak bytes during a step, above that: with decay, gradients of its own."""
        total = sum(w.nbytes for _, w in named)
        return total, total if stage.staleness and self.weight_decay else 0
