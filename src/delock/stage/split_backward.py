"""Splits a backward pass: the gradients of the inputs at once, those of the weights later, with no product computed twice.

Zero-bubble schedules and interlocking backpropagation want the error of the stage below as early as it can be had, and the gradients of the
weights when there is time (Qi, Wan, Huang, Lin, ICLR 2024).

What PyTorch does. `torch.autograd.grad(roots, inputs)` walks the graph from the roots and computes whatever lies on a way to the given
inputs. Asked for the inputs of the stage alone, it leaves the products for the weights out.

Why that is not enough. Asked a second time, for the weights, it begins at the roots again and computes all errors between the layers anew:
three half passes instead of two. And `retain_graph` keeps everything that the first half no longer needs.

What we do. A node of the graph from which both the inputs and some weights are reached is a fork (a linear layer's addmm, a convolution):

    roots <-- n <-- n <-- leaves      The first half goes along the upper line, to the inputs of the stage, and a hook notes the error that
              |     |                 flows into every fork. The second half starts at each fork with its noted error and goes down to
              w     w                 its weights only, which is one product.

The second half asks autograd for the gradient from a `GradientEdge` of the fork, that is from a node inside the graph, with a given error.
The errors into the forks are held between the halves; the prediction of memory counts them as `deferred_errors`.

Three cases have no such second half. A weight that hangs from two forks (it is used twice), or that no fork reaches, has its gradient from
a second whole pass. A compiled stage is a single node of the graph: all gradients are computed at once, those of the weights kept for
later. The same is done where the module computes activations again in a backward, which every walk from a fork would do anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Gradients: TypeAlias = tuple[Tensor | None, ...]
DeferredWeightGrads: TypeAlias = Callable[[bool], Gradients]
"""Returns the gradients of the weights; its argument says whether the graph is needed once more."""


class TakesGradients(Protocol):
    """Takes gradients as `gradients` does."""

    def __call__(
        self, roots: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor | None], /, *, retain: bool
    ) -> Gradients: ...


def split_backward(
    roots: Sequence[Tensor], seeds: Sequence[Tensor | None], leaves: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Gradients, DeferredWeightGrads]:
    """Returns the gradients of `leaves`, and a function for those of `weights`, both for `seeds` flowing into `roots`."""
    forks = _forks(list(_backwards_from(roots)), leaves, weights) if roots and leaves else None
    if forks is None:
        return gradients(roots, leaves, seeds, retain=True), lambda retain: gradients(roots, weights, seeds, retain=retain)
    caught: dict[Node, Gradients] = {}
    handles = [node.register_prehook(_catch(caught, node)) for node in forks]
    try:
        errors = gradients(roots, leaves, seeds, retain=True)
    finally:
        for handle in handles:
            handle.remove()

    def later(retain: bool) -> Gradients:
        found: list[Tensor | None] = [None] * len(weights)
        for node, flow in caught.items():
            edges = [GradientEdge(node, i) for i, g in enumerate(flow) if g is not None]
            own = gradients(edges, [weights[i] for i in forks[node]], [g for g in flow if g is not None], retain=retain)
            for i, g in zip(forks[node], own, strict=True):
                found[i] = g
        return tuple(found)

    return errors, later


def joint_backward(
    roots: Sequence[Tensor], seeds: Sequence[Tensor | None], leaves: Sequence[Tensor], weights: Sequence[Tensor], take: TakesGradients
) -> tuple[Gradients, DeferredWeightGrads]:
    """Returns what `split_backward` does, for a graph that cannot be split: `take` has all gradients, those of the weights are kept."""
    found = take(roots, [*leaves, *weights], seeds, retain=True)
    return found[: len(leaves)], lambda retain: found[len(leaves) :]


def gradients(roots: Sequence[Any], inputs: Sequence[Tensor], seeds: Sequence[Tensor | None], *, retain: bool) -> Gradients:
    """Returns the gradient of every input, None where there is none; `retain`: the graph is needed once more."""
    if not (roots and inputs):
        return (None,) * len(inputs)
    return torch.autograd.grad(roots, inputs, seeds, retain_graph=retain, allow_unused=True)


def _catch(caught: dict[Node, Gradients], node: Node) -> Callable[[tuple[Tensor, ...]], None]:
    def hook(flow: tuple[Tensor, ...]) -> None:
        caught[node] = flow

    return hook


def _backwards_from(roots: Sequence[Tensor]) -> Iterator[Node]:
    """Yields every node of the graph behind the roots, each after all that lie behind it."""
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
    """Returns the forks, with the indices of the weights that hang from each; None if some weight hangs from two of them, or from none.

    A weight hangs from the first node on the way to the leaves that is reached from it.
    """
    is_leaf, index = {id(leaf) for leaf in leaves}, {id(w): i for i, w in enumerate(weights)}
    on_the_way: set[Node] = set()
    below: dict[Node, frozenset[int]] = {}  # node off the way -> the weights behind it
    forks: dict[Node, list[int]] = {}
    used: set[int] = set()
    for node in order:
        variable = getattr(node, "variable", None)
        children = [child for child, _ in node.next_functions if child is not None]
        if not (variable is not None and id(variable) in is_leaf) and on_the_way.isdisjoint(children):
            own = [index[id(variable)]] if id(variable) in index else []
            below[node] = frozenset(own).union(*(below[child] for child in children))
            continue
        on_the_way.add(node)
        hanging = frozenset[int]().union(*(below[child] for child in children if child not in on_the_way))
        if hanging & used:
            return None
        used |= hanging
        if hanging:
            forks[node] = sorted(hanging)
    reached = frozenset[int]().union(*below.values())
    return forks if reached <= used else None
