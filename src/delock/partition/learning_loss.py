"""Refuses a loss that computes with parameters of its own: no stage has them, so they would stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from delock.errors import UsageError


def refuse_learning_loss(losses: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Raises UsageError if losses depend on a tensor that learns, other than through the outputs of the network."""
    known = {id(one) for one in (*outputs, *_leaves(outputs))}
    if foreign := [one for one in _leaves(losses) if id(one) not in known]:
        raise UsageError(
            f"the loss computes with a parameter of its own, of shape {tuple(foreign[0].shape)}, which no stage would train: put it into "
            "the last layer of the model, or freeze it with requires_grad_(False)"
        )


def _leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns the tensors whose gradients a backward from these would accumulate."""
    found: list[Tensor] = []
    nodes: list[Any] = [one.grad_fn for one in tensors if one.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "AccumulateGrad":
            found.append(node.variable)
        new = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= new
        nodes += new
    return found
