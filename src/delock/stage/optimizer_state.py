"""The state of an optimizer: foreseen, before its first step, and loaded as it was saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def first_state(factory: Callable[..., Optimizer], named: Sequence[tuple[str, Tensor]], optimizer: Optimizer) -> dict[str, Any] | None:
    """Returns the state that `optimizer` will have after its first step: that of another one, for copies of a few weights.

    They are the smallest of each parameter group. None where the factory cannot do with these alone.
    """
    few = {id(min(group["params"], key=torch.numel)) for group in optimizer.param_groups if group["params"]}
    copied = [(name, nn.Parameter(w.detach().clone())) for name, w in named if id(w) in few]
    for _, w in copied:
        w.grad = torch.zeros_like(w)
    with suppress(Exception), torch.random.fork_rng(devices=[]):
        made = factory(copied)
        made.step()
        return made.state_dict()
    return None


def load_exactly(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Loads a state dict in its own dtypes: torch gives it those of the weights, as to a float32 number beside a float64 weight."""
    optimizer.load_state_dict(dict(saved))
    weights = [w for group in optimizer.param_groups for w in group["params"]]
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    for weight, number in zip(weights, numbers, strict=True):
        of_weight = optimizer.state.get(weight, {})
        for name, value in saved["state"].get(number, {}).items():
            if name in of_weight:
                of_weight[name] = _as_saved(of_weight[name], value)


def _as_saved(loaded: Any, saved: Any) -> Any:
    """Returns what was loaded, with those tensors in place of it that have another dtype."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(saved, dict) and loaded.keys() == saved.keys():
        return {name: _as_saved(one, saved[name]) for name, one in loaded.items()}
    if isinstance(loaded, list) and isinstance(saved, list) and len(loaded) == len(saved):
        return [_as_saved(one, other) for one, other in zip(loaded, saved, strict=True)]
    return loaded
