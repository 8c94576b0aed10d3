"""Builds the auxiliary heads of a run, or takes those of the request, and measures their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from delock.errors import UsageError
from delock.keys import key
from delock.nets.heads import HeadShare, build_head, choose, head_share
from delock.options import Execution
from delock.partition.layers import Layer
from delock.partition.measure import LayerCost
from delock.run.layout_choice import measured
from delock.run.request import Request
from delock.tensors import kind


def auxiliary(request: Request, K: int, shapes: Sequence[tuple[int, ...]], logits: tuple[int, ...]) -> dict[int, nn.Module]:
    """Returns the auxiliary heads of the stages that have one. `shapes`: of the outputs of stages 0 .. K-2, for one sample."""
    wanted = request.method.headed(K)
    given = request.heads
    if given is not None and not request.method.local_losses:
        raise UsageError(f"{request.method.name} has no local losses, so it takes no heads")
    if given is not None and not isinstance(given, str):
        _refuse_unfit(request.method.name, wanted, K, given)
        return dict(zip(wanted, given, strict=True))
    return {k: _head(request, k, shapes[k], logits) for k in wanted}


def _refuse_unfit(method: str, wanted: range, K: int, given: Sequence[nn.Module]) -> None:
    """Raises UsageError unless each of the stages that have a head is given one of its own."""
    if not isinstance(given, Sequence | nn.ModuleList | nn.Sequential):
        raise UsageError(
            f"heads is {kind(given)}, but it must be the name of a head, or a list with a module for each of the stages "
            f"{', '.join(map(str, wanted))}"
        )
    if len(given) != len(wanted):
        which = f"for stages {', '.join(map(str, wanted))}" if len(wanted) > 1 else f"for stage {wanted[0]}" if wanted else "for no stage"
        verb = "was" if len(given) == 1 else "were"
        raise UsageError(
            f"{method} in {K} stages needs {len(wanted)} auxiliary heads, {which}, but {len(given)} {verb} given: give one each"
        )
    for k, head in zip(wanted, given, strict=True):
        if not isinstance(head, nn.Module):
            raise UsageError(f"the auxiliary head of stage {k} is a {type(head).__name__}, but it must be a module")
    owner: dict[int, int] = {}
    for k, head in zip(wanted, given, strict=True):
        for weight in head.parameters():
            if owner.setdefault(id(weight), k) != k:
                raise UsageError(
                    f"the auxiliary heads of stages {owner[id(weight)]} and {k} share a parameter, but every stage trains its own: give "
                    "each a head of its own, as copy.deepcopy makes it"
                )


def _head(request: Request, k: int, shape: tuple[int, ...], logits: tuple[int, ...]) -> nn.Module:
    if not shape or not logits:
        raise UsageError(f"the output of stage {k} or of the network is a tuple, for which no head is known: give heads=[...] as modules")
    assert request.heads is None or isinstance(request.heads, str)
    return build_head(request.heads or choose(shape), shape, logits[-1], seed=key(request.seed, "head", k))


def head_cost(request: Request, execution: Execution, k: int, head: nn.Module, shape: tuple[int, ...], targets: Any) -> LayerCost:
    """Returns the cost of stage k's head on a whole batch. Raises UsageError if the head does not take the stage's outputs."""
    try:
        outputs = torch.zeros(shape, dtype=next((w.dtype for w in head.parameters()), None))
        return measured(request, execution, [Layer(f"head of stage {k}", head, head.training)], outputs, targets, learns=True)[0]
    except UsageError as error:
        raise UsageError(f"the auxiliary head of stage {k} does not fit: {error}") from error.__cause__


def head_shares(
    modules: Sequence[nn.Module], heads: Mapping[int, nn.Module], shapes: Sequence[tuple[int, ...]], inputs: Any
) -> dict[int, HeadShare]:
    """Returns the cost of every head in shares of its stage's, if known. `shapes`: of the outputs of stages 0 .. K-2, for one sample."""
    shares = {}
    for k, head in heads.items():
        if k and not shapes[k - 1]:  # a tuple
            continue
        dtype = next(modules[k].parameters(), torch.zeros(())).dtype
        try:
            shares[k] = head_share(modules[k], head, inputs if k == 0 else torch.zeros(1, *shapes[k - 1], dtype=dtype))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # one sample is not enough for it: it can train, though
            continue
    return shares
