"""Saves and restores a stage with its batches in flight: a graph is saved as its input and its weights, and built again from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from delock.errors import UsageError
from delock.execution import module_of
from delock.links.message import Message, as_values
from delock.ops import Forward, Weights
from delock.plan.steps import Step
from delock.stage.in_flight import InFlight
from delock.stage.loading import load_module, make_buffers, volatile
from delock.stage.module import ModuleFunction
from delock.stage.module import Weights as Tensors
from delock.stage.stage import Stage
from delock.tensors import address

FORWARD = ("batch", "train", "source", "behind", "ahead")
SEEN = ("clones_inputs", "recomputes", "written")  # by a module's first forward, which is not always like the later ones


def state(stage: Stage) -> dict[str, Any]:
    """Returns everything that the stage needs to go on elsewhere, as plain values and tensors; save or copy it before the stage goes on.

    Raises UsageError for at="mixed" without resumable=True: the weights that its graphs were built with are gone.
    """
    if stage.mixed and not stage.resumable and stage.in_flight:
        raise UsageError('a stage with at="mixed" can be saved in the middle of a run only when it was built with resumable=True')
    return {
        "module": stage.body.module.state_dict(),
        "head": stage.head.module.state_dict() if stage.head else None,
        "volatile": {part: volatile(body.module) for part, body in _bodies(stage).items()},
        "learner": stage.learner.state(),
        "seen": {part: {name: getattr(body, name) for name in SEEN} for part, body in _bodies(stage).items()},
        "banks": {version: _detached(weights) for version, weights in stage.banks.kept.items() if version < stage.version},
        "in_flight": {batch: _saved(stage, held) for batch, held in stage.in_flight.items()},
        "loss": _loss_state(stage),
    }


def recorded(stage: Stage) -> tuple[dict[str, Any], set[int]]:
    """Returns `state`, and the addresses of what need not be copied to save it later: copies of the weights, which never change.

    The current weights are there as the copy that the next Forward may need, too.
    """
    now, found = stage.current(), state(stage)
    module = found["module"]
    own = {name: now[name].detach() for name, w in stage.body.weights.items() if name in module and address(module[name]) == address(w)}
    copies = [now, *stage.banks.kept.values(), *(held.weights for held in stage.in_flight.values() if held.weights)]
    return {**found, "module": {**module, **own}}, {address(w) for weights in copies for w in weights.values()}


def load(stage: Stage, saved: Mapping[str, Any]) -> None:
    """Continues from `state` of an equal stage: every graph is built again at the weights it was built with, bit for bit."""
    for part, body in _bodies(stage).items():
        load_module(body.module, saved[part] or {}, saved["volatile"][part], f"{part} of stage {stage.k}")
        for name in SEEN:
            setattr(body, name, saved["seen"][part][name])
    load_loss(stage, saved)
    stage.learner.load(saved["learner"])
    stage.banks.kept = {version: _leaves(weights) for version, weights in saved["banks"].items()}
    stage.banks.drawn = {}
    copies: dict[tuple[int, float], Tensors] = {}  # one copy for all graphs at the same weights
    stage.in_flight = {batch: _restored(stage, copies, one) for batch, one in saved["in_flight"].items()}


def _loss_state(stage: Stage) -> dict[str, Any]:
    loss = _own_loss(stage)
    return {"state": loss.state_dict(), "volatile": volatile(loss)} if loss else {"state": {}, "volatile": {}}


def _own_loss(stage: Stage) -> nn.Module | None:
    """Returns the loss that the stage computes, if it is a module."""
    return module_of(stage.loss) if stage.head or stage.k == stage.K - 1 else None


def load_loss(stage: Stage, saved: Mapping[str, Any]) -> None:
    """Loads the loss of a stage from `state` of another, with the buffers that it had made in its calls."""
    loss, found = _own_loss(stage), saved["loss"]
    if loss is not None:
        make_buffers(loss, found["state"], found["volatile"])
        load_module(loss, found["state"], found["volatile"], f"loss of stage {stage.k}")


def _bodies(stage: Stage) -> dict[str, ModuleFunction]:
    return {"module": stage.body, **({"head": stage.head} if stage.head else {})}


def _saved(stage: Stage, held: InFlight) -> dict[str, Any]:
    """Returns the Forward, its message, the version of the weights, those unless a bank has them, buffers, and if there is a graph."""
    kept = held.weights is None or held.weights is stage.banks.kept.get(held.version)
    return {
        "forward": _forward_values(held.step),
        "message": as_values(held.message),
        "version": held.version,
        "weights": None if kept else _detached(held.weights or {}),
        "buffers": None if held.buffers is None else stage.body.copies.outdated(held.buffers, stage.body.written),
        "extra": held.extra,
        "graph": held.outputs is not None,
    }


def _restored(stage: Stage, copies: dict[tuple[int, float], Tensors], one: Mapping[str, Any]) -> InFlight:
    step = _forward_step(one["forward"])
    held = InFlight(step, Message(**one["message"]), one["version"], extra=one["extra"])
    if one["buffers"] is not None:
        held.buffers = (stage.body.buffers(resumable=True) or {}) | one["buffers"]
    if one["weights"] is not None:
        ahead = step.op.weights.ahead  # type: ignore[union-attr]
        held.weights = copies.setdefault((held.version, ahead), _leaves(one["weights"]))
    elif held.message.values is not None and (step.snapshot or (stage.mixed and one["graph"])):
        held.weights = stage.banks.of(held.version, stage.version)
    if one["graph"] and held.message.values is not None:
        _rebuild(stage, held)
    return held


def _forward_values(step: Step) -> dict[str, Any]:
    """Returns a Forward in its place in the plan as plain values."""
    op = step.op
    assert isinstance(op, Forward)
    rest = {name: getattr(step, name) for name in Step.__dataclass_fields__ if name != "op"}
    return {**rest, "batch": op.batch, "train": op.train, "source": op.source, "behind": op.weights.behind, "ahead": op.weights.ahead}


def _forward_step(values: Mapping[str, Any]) -> Step:
    batch, train, source, behind, ahead = (values[name] for name in FORWARD)
    rest = {name: value for name, value in values.items() if name not in FORWARD}
    return Step(Forward(batch, train, source, Weights(behind, ahead)), **rest)


def _rebuild(stage: Stage, held: InFlight) -> None:
    with stage.body.with_extra_state(held.extra):
        if not stage.mixed or held.weights is None:
            stage.build(held, held.weights, is_replay=True)
            return
        with stage.banks.in_place(held.weights):
            stage.build(held, None, is_replay=True)


def _detached(weights: Mapping[str, Tensor]) -> Tensors:
    return {name: w.detach() for name, w in weights.items()}


def _leaves(weights: Mapping[str, Tensor]) -> Tensors:
    return {name: nn.Parameter(w.clone()) for name, w in weights.items()}
