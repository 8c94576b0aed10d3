"""Measures the layers as the stages will compute, and chooses between two layouts of images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from delock.options import Execution
from delock.partition.layers import Layer
from delock.partition.measure import LayerCost, measure
from delock.run.request import Request


def choose_layout(
    request: Request, layers: list[Layer], inputs: Any, targets: Any, *, counts: bool = False
) -> tuple[Execution, list[LayerCost]]:
    """Returns the execution with its layout settled, and the cost of every layer under it; "auto" is the layout that is faster now.

    counts: the costs have the counted work, too.
    """
    asked = request.execution
    ways = [replace(asked, layout="default"), replace(asked, layout="channels-last")] if asked.layout == "auto" else [asked]
    tried = [(execution, measured(request, execution, layers, inputs, targets, counts=counts)) for execution in ways]
    return min(tried, key=lambda pair: sum(cost.total_s for cost in pair[1]))


def measured(
    request: Request, execution: Execution, layers: list[Layer], inputs: Any, targets: Any, *, learns: bool = False, counts: bool = False
) -> list[LayerCost]:
    """Returns the cost of every layer on a batch, uncompiled, with the threads of a stage; `learns`: the inputs need gradients."""
    before, plain = torch.get_num_threads(), replace(execution, compile=False)
    try:
        torch.set_num_threads(request.placement.threads)
        return measure(layers, inputs, targets, request.criterion, device=request.device, execution=plain, learns=learns, counts=counts)
    finally:
        torch.set_num_threads(before)
