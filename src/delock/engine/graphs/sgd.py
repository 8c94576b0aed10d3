"""SGD that can be recorded: its learning rate is a tensor, and it writes in place, unseen by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from delock.errors import UsageError
from delock.stage import OptimizerFactory


class CapturedSGD(torch.optim.SGD):
    """torch.optim.SGD with the parameter groups of `made`; `upload_rates` brings their rates to the device.

    torch's own asks the device for a rate that is a tensor (alpha=-lr), which no recording allows. The step is its step but for one
    rounding: lr times the direction is rounded before it is subtracted. Momentum starts at 0, which without dampening is the same.
    """

    def __init__(self, made: torch.optim.SGD) -> None:
        super().__init__(made.param_groups)
        self.rates: list[Tensor] = []
        self.uploaded: list[float] = []
        for group in self.param_groups:
            first = next(iter(group["params"]), torch.zeros(()))  # a group may have none on a stage
            self.rates.append(torch.zeros((), dtype=first.dtype, device=first.device))
            self.uploaded.append(0.0)

    def upload_rates(self) -> None:
        """Lets the next steps use the groups' learning rates as they are now."""
        for i, group in enumerate(self.param_groups):
            if group["lr"] != self.uploaded[i]:
                self.rates[i].fill_(group["lr"])
                self.uploaded[i] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """w <- w - lr m, m <- momentum m + g + weight_decay w; with nesterov along g + momentum m."""
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            own = [w for w in group["params"] if w.grad is not None]
            if own:
                weights = [w.data for w in own]  # another version counter than that of the graphs that wait for their backward
                torch._foreach_add_(weights, torch._foreach_mul(self._directions(group, own, weights), -rate))

    def _directions(self, group: dict[str, Any], own: list[Tensor], weights: list[Tensor]) -> Any:
        grads: Any = [w.grad for w in own]
        if group["maximize"]:
            grads = torch._foreach_neg(grads)
        if group["weight_decay"]:
            grads = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
        if not group["momentum"]:
            return grads
        momenta = [self._momentum(w) for w in own]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        return torch._foreach_add(grads, momenta, alpha=group["momentum"]) if group["nesterov"] else momenta

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        found: Tensor = state["momentum_buffer"]
        return found

    def momenta(self) -> list[Tensor]:
        """Returns its momenta, which it keeps from step to step."""
        return [state["momentum_buffer"] for state in self.state.values() if "momentum_buffer" in state]


def capturable(factory: OptimizerFactory) -> OptimizerFactory:
    """Returns a factory of the same optimizer in a form that can be recorded; it raises UsageError for anything but plain SGD."""

    def make(named: Any) -> Optimizer:
        made = factory(named)
        if type(made) is not torch.optim.SGD or any(group["dampening"] or group["differentiable"] for group in made.param_groups):
            raise UsageError(
                f"captured ticks know torch.optim.SGD without dampening, not {type(made).__name__}: use it, or leave captured out"
            )
        return CapturedSGD(made)

    return make
