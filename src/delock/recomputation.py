"""Activation checkpointing: finds out if a module computes again in a backward, and lends it what it had in its forward.

What PyTorch does. `torch.utils.checkpoint` drops the activations of a part of a module. A backward that needs them runs that part again,
with the weights and buffers that the module has at that moment.

Why that is not enough. Between Forward and Backward of a batch there may be Updates. The activations would be those of newer weights, so
a derivative at="stash" would silently become another one in that part, and batch norm would count the batch twice.

What we do. `Lender` has the weights and buffers of the Forward in their places while autograd goes backward. That costs as much as
`functional_call` does, so a stage leaves it out where its first Backward, seen by `Rereading`, has computed nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.func import functional_call

from delock.errors import UsageError

R = TypeVar("R")


class Rereading:
    """Notes in `seen` if, within the block, a module or one inside it runs, or hands out a weight or a buffer."""

    def __init__(self, module: nn.Module) -> None:
        self.seen = False
        self._inside, self._hooks = list(module.modules()), list[Any]()
        self._tables = [(one.__dict__, name, one.__dict__[name]) for one in self._inside for name in ("_parameters", "_buffers")]

    def __enter__(self) -> Rereading:
        self._hooks = [one.register_forward_pre_hook(self._note) for one in self._inside]
        for place, name, table in self._tables:
            place[name] = _Noting(table, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for place, name, table in self._tables:
            place[name] = table
        for hook in self._hooks:
            hook.remove()

    def _note(self, *_: object) -> None:
        self.seen = True


class _Noting(dict[str, Any]):
    """Calls `note` whenever something is looked up: a part that is checkpointed need not be a module."""

    def __init__(self, table: Mapping[str, Any], note: Callable[[], None]) -> None:
        super().__init__(table)
        self._note = note

    def __getitem__(self, name: str) -> Any:
        self._note()
        return super().__getitem__(name)


class Lender(nn.Module):
    """Calls functions while a module has other weights and buffers than its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], R]) -> R:
        return function()

    def lend(self, named: Mapping[str, Tensor | None], function: Callable[[], R]) -> R:
        """Returns function(), called while the module has these tensors in place of its own."""
        result: R = functional_call(self, cast(dict[str, Tensor], {f"module.{name}": t for name, t in named.items()}), (function,))
        return result


def refuse_with_mixed(what: str) -> None:
    """Raises UsageError: `what` computes again in a backward, but at="mixed" no longer has the weights for it."""
    raise UsageError(
        f'{what} computes activations again in the backward (torch.utils.checkpoint), but at="mixed" has overwritten the weights that '
        'they were computed with, so the gradient would be neither mixed nor stash: use at="stash" (instead of paci the method ddg), '
        "or take the checkpointing out"
    )
