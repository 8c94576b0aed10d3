"""Tells whose state the weights of an optimizer have: optimizers of the same kind can go on with each other's."""

from __future__ import annotations

from torch.optim import Optimizer

from delock.optim.several import Several
from delock.optim.spike import SCSGD, SCAdamW

AS_TORCH = ((SCAdamW, "AdamW"), (SCSGD, "SGD"))  # their state has the names and the meaning of torch's


def kinds(optimizer: Optimizer) -> list[str]:
    """Returns, group by group, the class whose state its weights have: that of a part, and of torch where the state is the same."""
    if isinstance(optimizer, Several):
        return [name for one in optimizer.optimizers for name in kinds(one)]
    kind = next((name for own, name in AS_TORCH if isinstance(optimizer, own)), type(optimizer).__name__)
    return [kind] * len(optimizer.param_groups)
