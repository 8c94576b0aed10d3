"""What a stage remembers of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from delock.links.message import Message
from delock.plan import Step
from delock.stage.module import Weights
from delock.stage.split_backward import DeferredWeightGrads, Grads
from delock.tensors import Tree


@dataclass(slots=True)
class InFlight:
    """One batch between its Forward and its last Backward on a stage."""

    step: Step  # the Forward
    message: Message  # what came in; its tensors are never written to
    taken: int  # version of the weights that the derivative is taken at
    weights: Weights | None = None  # those weights, where they are not the current ones' own storage
    leaves: tuple[Tensor, ...] = ()  # floating inputs as the graph knows them
    outputs: Tree = None  # with the graph behind it; None while there is none
    halves: dict[int, tuple[DeferredWeightGrads, Grads]] = field(
        default_factory=dict
    )  # loss -> what is left of its Backward, and the errors passed on
