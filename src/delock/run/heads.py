"""Builds the auxiliary heads of a run, or takes those of the request; tries them on the loss, and measures their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from delock.errors import UsageError
from delock.keys import key
from delock.memory.sizes import Outputs
from delock.nets.heads import HeadShare, Logits, build_fitting, fitting, head_share
from delock.options import Execution
from delock.partition.head_loss import HeadLoss, head_loss
from delock.partition.layers import Layer
from delock.partition.measure import LayerCost
from delock.run.layout_choice import measured
from delock.run.request import Request
from delock.tensors import Value, is_floating, kind, tree_tensors


@dataclass(frozen=True)
class Goal:
    """Holds what the heads of a run have to predict.

    loss: of a head that returns one of the network's outputs; logits: that output, None where the loss needs several: why.
    first: a head is given the first tensor of its stage's output alone, the main activation of a traced stage.
    """

    loss: HeadLoss
    logits: Logits | None
    why: str
    first: bool

    @classmethod
    def of(cls, request: Request, outputs: Outputs, targets: Any) -> Goal:
        """Returns the goal for a network with these outputs. Raises UsageError for a model that computes its own loss."""
        split = request.network.split
        loss, why = head_loss(request.criterion, split.structures[True] if split else None, outputs, targets)
        labels = next((tuple(one.shape) for one in tree_tensors(targets) if not is_floating(one)), ())
        return cls(loss, None if loss.place is None else Logits.of(outputs[loss.place][0], labels), why, split is not None)

    def entering(self, outputs: Outputs) -> Outputs:
        """Returns the tensors of a stage's output that its head is given."""
        return outputs[:1] if self.first else outputs

    def name(self, outputs: Outputs) -> str:
        """Returns the name of a head for a stage's output, or "" if none is known."""
        found = self.entering(outputs)
        return fitting(found[0][0], self.logits) if len(found) == 1 and self.logits and found[0][1].is_floating_point else ""


def refuse_own_loss(request: Request, K: int) -> None:
    """Raises UsageError for heads of a model that computes its own loss: they know no labels."""
    if request.loss is None and request.method.headed(K):
        raise UsageError(
            f"{request.method.name} has a loss in every stage, but this model computes its loss itself, which the head of a stage cannot: "
            "give fit a loss(outputs, targets), as loss=lambda out, y: cross_entropy(out.logits, y)"
        )


def auxiliary(request: Request, K: int, outputs: Sequence[Outputs], goal: Goal | None) -> dict[int, nn.Module]:
    """Returns the auxiliary heads of the stages that have one. `outputs`: of stages 0 .. K-2, on a batch; goal: None without heads."""
    wanted = request.method.headed(K)
    given = request.heads
    if given is not None and not request.method.local_losses:
        raise UsageError(f"{request.method.name} has no local losses, so it takes no heads")
    if given is not None and not isinstance(given, str):
        _refuse_unfit(request.method.name, wanted, K, given)
        return dict(zip(wanted, given, strict=True))
    return {k: _built(request, k, outputs[k], goal) for k in wanted if goal}


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


def _built(request: Request, k: int, outputs: Outputs, goal: Goal) -> nn.Module:
    """Returns the head of stage k, by the name that is given or by what fits. Raises UsageError if none does."""
    assert request.heads is None or isinstance(request.heads, str)
    known, (shape, dtype) = goal.name(outputs), outputs[0]
    name = request.heads if request.heads and goal.logits and len(goal.entering(outputs)) == 1 else known
    if not name:
        raise UsageError(_no_head(k, outputs, goal))
    assert goal.logits
    head = build_fitting(name, shape, goal.logits, key(request.seed, "head", k))
    return head if request.execution.amp != "no" or not dtype.is_floating_point else head.to(dtype)


def _no_head(k: int, outputs: Outputs, goal: Goal) -> str:
    shapes = f"{_listed(outputs)}" if len(outputs) == 1 else f"a tuple of {_listed(outputs)}"
    wants = f"the loss takes {_listed([(goal.logits.shape, None)])}" if goal.logits else f"the loss needs more than one tensor ({goal.why})"
    given = "the first of these" if goal.first and len(outputs) > 1 else "this"
    return (
        f"no head is known for stage {k}, whose output is {shapes}, and {wants}: cut elsewhere, or give heads=[...], a module for each "
        f"stage with a head, from {given} to what the loss takes"
    )


def _listed(outputs: Sequence[tuple[tuple[int, ...], torch.dtype | None]]) -> str:
    return ", ".join(f"{shape} {str(dtype or '').removeprefix('torch.')}".strip() for shape, dtype in outputs)


def tried(
    request: Request, execution: Execution, heads: Mapping[int, nn.Module], outputs: Sequence[Outputs], goal: Goal, targets: Any
) -> tuple[dict[int, LayerCost], dict[int, HeadLoss]]:
    """Tries every head on its stage's output and the loss. Returns the cost of each on a whole batch, where it can be tried, and its loss.

    A head of the user's may return what the loss takes as the model does not return it. Raises UsageError if a head does not fit.
    """
    costs, losses = dict[int, LayerCost](), dict[int, HeadLoss]()
    for k, head in heads.items():
        found, ways = goal.entering(outputs[k]), [goal.loss, *([replace(goal.loss, place=None)] if goal.loss.place is not None else [])]
        losses[k] = goal.loss
        if not all(dtype.is_floating_point or dtype.is_complex for _, dtype in found):
            continue  # numbers that mean something, as places in a table: zeros might not fit
        failed: list[UsageError] = []
        for losses[k] in ways:
            try:
                costs[k] = _cost(replace(request, loss=losses[k]), execution, k, head, found, targets)
                break
            except UsageError as error:
                failed.append(error)
        else:
            raise UsageError(
                f"the auxiliary head of stage {k}, whose input is {_listed(found)}, does not fit: {failed[0]}; give heads=[...] that do"
            ) from failed[0].__cause__
    return costs, losses


def _cost(request: Request, execution: Execution, k: int, head: nn.Module, found: Outputs, targets: Any) -> LayerCost:
    zeros = [torch.zeros(shape, dtype=dtype) for shape, dtype in found]
    inputs: Value = zeros[0] if len(zeros) == 1 else tuple(zeros)
    return measured(request, execution, [Layer(f"head of stage {k}", head, head.training)], inputs, targets, learns=True)[0]


def head_shares(
    modules: Sequence[nn.Module], heads: Mapping[int, nn.Module], outputs: Sequence[Outputs], inputs: Value, goal: Goal
) -> dict[int, HeadShare]:
    """Returns the cost of every head in shares of its stage's, if known. `outputs`: of stages 0 .. K-2, on a batch."""
    shares = {}
    for k, head in heads.items():
        if k and len(outputs[k - 1]) > 1:
            continue
        try:
            entering = torch.zeros(1, *outputs[k - 1][0][0][1:], dtype=outputs[k - 1][0][1]) if k else inputs
            shares[k] = head_share(modules[k], head, entering, first=goal.first)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # one sample is not enough for it: it can train, though
            continue
    return shares
