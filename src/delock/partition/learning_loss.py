"""Finds weights that a loss or a layer computes with and does not own: no stage has them, so they would stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from delock.errors import UsageError
from delock.optim.objects import WITH_LOSS


def refuse_learning_loss(losses: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Raises UsageError if losses depend on a tensor that learns, other than through the outputs of the network."""
    known = {id(one) for one in (*outputs, *_leaves(outputs))}
    if foreign := [one for one in _leaves(losses) if id(one) not in known]:
        raise UsageError(
            f"the loss computes with a parameter of its own, of shape {tuple(foreign[0].shape)}, which no stage would train: {WITH_LOSS}, "
            "or freeze it with requires_grad_(False)"
        )


def foreign_weight(outputs: Sequence[Tensor], own: Iterable[Tensor], again: Callable[[], Sequence[Tensor]]) -> str:
    """Returns what is to be said of a layer whose outputs depend on a tensor that learns and is none of its own; "" if none does.

    own: the layer's parameters, buffers and inputs; again: computes the outputs once more. What a forward makes for itself, as to take a
    gradient of its own, is another tensor then.
    """
    known = {id(one) for one in own}
    foreign = [one for one in _leaves(outputs) if id(one) not in known]
    kept = {id(one) for one in _leaves(again())} if foreign else set()
    if foreign := [one for one in foreign if id(one) in kept]:
        return (
            f"uses a weight of shape {tuple(foreign[0].shape)} that is none of its parameters, as one kept in a list or a closure: a stage "
            "would train another copy of it; make it, or the module that has it, an attribute"
        )
    return ""


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
