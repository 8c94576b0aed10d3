"""What is in flight on a stage, as values that can be saved: a graph is its input and its weights, and is built again from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from delock.errors import UsageError
from delock.stage.in_flight import InFlight
from delock.stage.module import Weights
from delock.stage.stage import Stage


def state(stage: Stage) -> dict[str, Any]:
    """Everything the stage needs to go on elsewhere; save or copy it before the stage goes on.

    Raises UsageError for at="mixed" without resumable=True: the weights that its graphs were built with are gone.
    """
    if stage.mixed and not stage.resumable and stage.memory:
        raise UsageError('a stage with at="mixed" can be saved in the middle of a run only when it was built with resumable=True')
    return {
        "module": stage.body.module.state_dict(),
        "head": stage.head.module.state_dict() if stage.head else None,
        "learner": stage.learner.state(),
        "clones_inputs": stage.body.clones_inputs,
        "memory": {b: (m.step, m.message, m.taken, _weights_of(stage, m), m.outputs is not None) for b, m in stage.memory.items()},
    }


def load(stage: Stage, saved: Mapping[str, Any]) -> None:
    """Continue from `state` of an equal stage: every graph is built again at the weights it was built with, bit for bit."""
    stage.body.module.load_state_dict(saved["module"])
    if stage.head:
        stage.head.module.load_state_dict(saved["head"])
    stage.learner.load(saved["learner"])
    stage.body.clones_inputs = saved["clones_inputs"]
    stage.snapshot, stage.memory = None, {}
    shared: dict[int, Weights] = {}  # version -> its weights, one copy for all graphs
    for batch, (step, message, taken, weights, graph) in saved["memory"].items():
        memory = InFlight(step, message, taken)
        if weights is not None:
            memory.weights = shared.setdefault(taken, {name: w.clone().requires_grad_() for name, w in weights.items()})
        elif step.snapshot or (stage.mixed and graph):
            memory.weights = stage.current()
        if graph and message.values is not None:
            _rebuild(stage, memory)
        stage.memory[batch] = memory


def _weights_of(stage: Stage, memory: InFlight) -> Weights | None:
    if memory.weights is None or memory.weights is stage.snapshot:
        return None  # the current ones
    return {name: w.detach() for name, w in memory.weights.items()}


def _rebuild(stage: Stage, memory: InFlight) -> None:
    if not stage.mixed or memory.weights is None:
        stage.build(memory, memory.weights, is_replay=True)
        return
    now = {name: w.detach().clone() for name, w in stage.body.weights.items()}
    _overwrite(stage, memory.weights)
    stage.build(memory, None, is_replay=True)
    _overwrite(stage, now)


def _overwrite(stage: Stage, values: Mapping[str, Tensor]) -> None:
    """Write to the weights unseen by autograd, under the live graphs, as the optimizer does."""
    for weight, value in zip(stage.learner.weights, values.values(), strict=True):
        weight.data.copy_(value)
