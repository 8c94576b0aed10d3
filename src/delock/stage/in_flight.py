"""A batch in flight: the part of it that a stage holds between its Forward and its last Backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from delock.links.message import Message
from delock.plan.steps import Step
from delock.stage.buffers import Buffers
from delock.stage.module import Weights
from delock.stage.split_backward import DeferredWeightGrads, Gradients
from delock.tensors import Tree


@dataclass(slots=True)
class InFlight:
    """One batch between its Forward and its last Backward on a stage."""

    step: Step  # the Forward
    message: Message  # as it came in; its tensors are never written to
    version: int  # of the weights that the derivative is taken at
    weights: Weights | None = None  # those weights, where they are not the current ones' own storage
    buffers: Buffers | None = None  # as the graph's forward found them, where a backward may compute again
    extra: dict[str, Any] | None = None  # the module's extra state as it found that, where the graph may be built again
    leaves: tuple[Tensor, ...] = ()  # floating inputs as the graph knows them
    outputs: Tree = None  # a value, with the graph behind it; None while there is none
    deferred: dict[int, tuple[DeferredWeightGrads, Gradients]] = field(default_factory=dict)
    """By loss: the weight gradients of a Backward of the input, and the errors that it passed on."""
