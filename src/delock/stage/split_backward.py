"""A backward pass in two halves: the gradient of the inputs at once, that of the weights later, with no product computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Grads = tuple[Tensor | None, ...]
DeferredWeightGrads = Callable[[bool], Grads]
"""The gradients of the weights; its argument says whether the graph is needed once more."""


def split_backward(
    roots: Sequence[Tensor], seeds: Sequence[Tensor | None], leaves: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Grads, DeferredWeightGrads]:
    """Gradients of `leaves` as autograd gives them, and a function for those of `weights`, both for `seeds` flowing into `roots`.

        roots <-- n <-- n <-- leaves      n: a fork, a node on the way to the leaves from which weights hang. The first half goes along
                  |     |                 the upper line and notes what flows into every fork; the second goes from each fork
                  w     w                 down to its weights.

    This is how zero-bubble schedules split a backward (Qi, Wan, Huang, Lin, ICLR 2024). A weight that hangs from two forks (it is used
    twice) has its gradient from a second whole pass.
    """
    forks = _forks(list(_backwards_from(roots)), leaves, weights) if roots and leaves else None
    if forks is None:
        return _grad(roots, leaves, seeds, True), lambda retain: _grad(roots, weights, seeds, retain)
    caught: dict[Node, tuple[Tensor | None, ...]] = {}
    handles = [node.register_prehook(_catch(caught, node)) for node in forks]
    try:
        grads = _grad(roots, leaves, seeds, True)
    finally:
        for handle in handles:
            handle.remove()

    def later(retain: bool) -> Grads:
        found: list[Tensor | None] = [None] * len(weights)
        for node, flow in caught.items():
            edges = [GradientEdge(node, i) for i, g in enumerate(flow) if g is not None]
            own = [weights[i] for i in forks[node]]
            into = [g for g in flow if g is not None]
            for i, g in zip(forks[node], _grad(edges, own, into, retain), strict=True):
                found[i] = g
        return tuple(found)

    return grads, later


def joint(
    roots: Sequence[Tensor], seeds: Sequence[Tensor | None], leaves: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Grads, DeferredWeightGrads]:
    """What `halves` gives, where the graph is a single node, as that of compiled code: all gradients at once, those of the weights kept."""
    found = _grad(roots, [*leaves, *weights], seeds, True)
    return found[: len(leaves)], lambda retain: found[len(leaves) :]


def _grad(roots: Sequence[Any], inputs: Sequence[Tensor], seeds: Sequence[Tensor | None], retain: bool) -> Grads:
    if not (roots and inputs):
        return (None,) * len(inputs)
    return torch.autograd.grad(roots, inputs, seeds, retain_graph=retain, allow_unused=True)


def _catch(caught: dict[Node, Any], node: Node) -> Callable[[tuple[Tensor, ...]], None]:
    def hook(flow: tuple[Tensor, ...]) -> None:
        caught[node] = flow

    return hook


def _backwards_from(roots: Sequence[Tensor]) -> Iterator[Node]:
    """Every node of the graph behind the roots, each after all that lie behind it."""
    seen: set[Node] = set()
    stack = [(root.grad_fn, False) for root in roots if root.grad_fn is not None]
    while stack:
        node, children_done = stack.pop()
        if children_done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None and child not in seen)


def _forks(order: Sequence[Node], leaves: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[Node, list[int]] | None:
    """The forks with the numbers of the weights that hang from each; None where a weight hangs from two, or from a root's own branch."""
    is_leaf, number = {id(leaf) for leaf in leaves}, {id(w): i for i, w in enumerate(weights)}
    on_the_way: set[Node] = set()
    below: dict[Node, frozenset[int]] = {}  # for a node off the way: the weights behind it
    forks: dict[Node, list[int]] = {}
    used: set[int] = set()
    for node in order:
        variable = getattr(node, "variable", None)
        children = [child for child, _ in node.next_functions if child is not None]
        if (variable is not None and id(variable) in is_leaf) or any(child in on_the_way for child in children):
            on_the_way.add(node)
            own = frozenset[int]().union(*(below[child] for child in children if child not in on_the_way))
            if own & used:
                return None
            used |= own
            if own:
                forks[node] = sorted(own)
        else:
            hanging = [below[child] for child in children]
            below[node] = frozenset([number[id(variable)]] if id(variable) in number else ()).union(*hanging)
    reached = frozenset[int]().union(*below.values())
    return forks if reached <= used else None
