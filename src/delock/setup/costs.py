"""What layers cost here and now, in the way of computing that is asked for."""

from __future__ import annotations

from typing import Any

import torch

from delock.computing import Computing
from delock.nets.measure import AtomCost, measure
from delock.nets.split import Atom
from delock.setup.spec import Spec


def choice(spec: Spec, parts: list[Atom], inputs: Any, targets: Any) -> tuple[Computing, list[AtomCost]]:
    """How to compute, and what the atoms cost then; of two layouts the one that is faster here and now."""
    layouts = {"default": (False,), "channels-last": (True,), "auto": (False, True)}[spec.layout]
    ways = [Computing(spec.amp, channels_last, spec.chunks) for channels_last in layouts]
    tried = [(how, measured(spec, how, parts, inputs, targets)) for how in ways]
    return min(tried, key=lambda pair: sum(cost.total_s for cost in pair[1]))


def measured(spec: Spec, how: Computing, parts: list[Atom], inputs: Any, targets: Any, *, learns: bool = False) -> list[AtomCost]:
    """What every atom costs on a batch, with the threads of a stage; `learns`: the inputs want gradients."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(spec.threads)
        return measure(parts, inputs, targets, spec.loss, device=spec.device, how=how, learns=learns)
    finally:
        torch.set_num_threads(before)
