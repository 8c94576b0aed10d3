"""What layers cost here and now, in the way of computing that is asked for."""

from __future__ import annotations

from typing import Any

import torch

from delock.execution import Execution
from delock.partition.layers import Layer
from delock.partition.measure import LayerCost, measure
from delock.run.request import Request


def choose_layout(request: Request, parts: list[Layer], inputs: Any, targets: Any) -> tuple[Execution, list[LayerCost]]:
    """How to compute, and what the atoms cost then; of two layouts the one that is faster here and now."""
    layouts = {"default": (False,), "channels-last": (True,), "auto": (False, True)}[request.layout]
    ways = [Execution(request.amp, channels_last, request.chunks) for channels_last in layouts]
    tried = [(execution, measured(request, execution, parts, inputs, targets)) for execution in ways]
    return min(tried, key=lambda pair: sum(cost.total_s for cost in pair[1]))


def measured(
    request: Request, execution: Execution, parts: list[Layer], inputs: Any, targets: Any, *, learns: bool = False
) -> list[LayerCost]:
    """What every atom costs on a batch, with the threads of a stage; `learns`: the inputs want gradients."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(request.threads)
        return measure(parts, inputs, targets, request.loss, device=request.device, execution=execution, learns=learns)
    finally:
        torch.set_num_threads(before)
