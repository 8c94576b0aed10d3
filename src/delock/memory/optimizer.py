"""How much memory an optimizer takes: two steps on weights that have a shape and no more, where it can be without."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from delock.errors import DelockError
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.partition.live_bytes import LiveBytes
from delock.run.request import Request
from delock.stage import OptimizerFactory

WeightShapes = Sequence[tuple[str, tuple[int, ...], torch.dtype]]  # name in the unsplit model, shape, dtype
Steps = tuple[int, int]
"""Bytes of the state that is there from the first step on, and how much more lives within a step."""


@dataclass(frozen=True)
class Question:
    """An optimizer, and the weights that every stage would give it."""

    optimizer: OptimizerFactory
    weights: Sequence[WeightShapes]
    device: str


def learned(module: nn.Module, head: nn.Module | None, k: int) -> WeightShapes:
    """The weights of stage k, named as the stage names them."""
    names = getattr(module, "original", {})
    own = [(names.get(name, name), w) for name, w in module.named_parameters()]
    own += [(f"heads.{k}.{name}", w) for name, w in head.named_parameters()] if head else []
    return [(name, tuple(w.shape), w.dtype) for name, w in own if w.requires_grad]


def optimizers(request: Request, weights: Sequence[WeightShapes]) -> list[Steps | None]:
    """Of every stage; None where two steps cannot be taken alone. Whether it can be used the stages will tell.

    A first optimizer loads torch's compiler, which takes seconds: processes have it already, and this one does without.
    """
    question = Question(request.optimizer, weights, request.device)
    if request.workers != "processes" or "torch._dynamo" in sys.modules or torch.device(request.device).type != "cpu":
        return answer(question)
    try:
        return run_processes(_answered, [question], pin=False)[0]
    except DelockError:
        return [None] * len(weights)


def _answered(rank: Rank, question: Question) -> list[Steps | None]:
    return answer(question)


def answer(question: Question) -> list[Steps | None]:
    """In this process."""
    return [_found(question.optimizer, weights, question.device) if weights else (0, 0) for weights in question.weights]


def _found(optimizer: OptimizerFactory, weights: WeightShapes, device: str) -> Steps | None:
    for where in ("meta", device) if torch.device(device).type == "cpu" else (device,):  # a GPU's steps are others
        try:
            return _steps(optimizer, weights, where)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            continue
    return None


def _steps(optimizer: OptimizerFactory, weights: WeightShapes, device: str) -> Steps:
    doubles = [(name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))) for name, shape, dtype in weights]
    for _, double in doubles:
        double.grad = torch.zeros_like(double)
    live = LiveBytes()
    live.ignore(tensor for _, double in doubles for tensor in (double, double.grad) if tensor is not None)
    one = optimizer(doubles)
    with live:
        one.step()
        state = live.from_here()
        one.step()
    return state, live.peak - state
