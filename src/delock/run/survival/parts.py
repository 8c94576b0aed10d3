"""The files of one stage in a checkpoint: its weights under their original names, its optimizer, and what was in flight.

weights-k     tensors by their names in the unsplit model; those of an auxiliary head as heads.k.NAME
optimizer-k   optimizer, schedule, gradients so far, and what the optimizer was made with
in-flight-k   batches between Forward and Backward, messages under way, older weights, counters, history, the place in the data;
              of a free-running stage its replay buffer
visits-k      of a free-running stage: its visits so far, and what is in its buffer
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delock.checkpoints.directory import Writer, read, read_tensors
from delock.checkpoints.manifest import Manifest
from delock.errors import UsageError
from delock.records import Cut


def write(writer: Writer, state: Mapping[str, Any], rest: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Writes the files of a stage. state: of its engine; rest: what lies beside it; names: its own -> those in the unsplit model."""
    stage = dict(state["stage"])
    weights = {part: stage.pop(part) or {} for part in ("module", "head")}
    learner = stage.pop("learner")
    odd = {part: {name: one for name, one in own.items() if not isinstance(one, Tensor)} for part, own in weights.items()}
    odd["module"], stage["volatile"] = _renamed(odd["module"], names), _volatile(stage["volatile"], names)
    writer.begin()
    writer.add_tensors("weights", _distinct(_original(weights, names, writer.k)))
    writer.add("optimizer", {"learner": learner, "made": rest["made"]})
    beside = {name: value for name, value in rest.items() if name not in ("made", "visits")}
    if "visits" in rest:
        writer.add("visits", rest["visits"])
    writer.add("in-flight", {**state, "stage": stage, "odd": odd, "rest": beside}, private=True)


def load(path: Path, k: int, names: Mapping[str, str], device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the state of an engine, and the rest that `write` was given. Raises UsageError for files of another kind."""
    tensors, _ = read_tensors(path / f"weights-{k}.safetensors")
    optimizer, found = read(path, "optimizer", k), _moved(read(path, "in-flight", k), device)
    under, own = f"heads.{k}.", {original: name for name, original in names.items()}
    head = {name.removeprefix(under): one for name, one in tensors.items() if name.startswith(under)} | found["odd"]["head"]
    module = {name: one for name, one in tensors.items() if not name.startswith(under)} | found["odd"]["module"]
    stage = {**found["stage"], "module": _renamed(module, own), "head": head or None, "learner": optimizer["learner"]}
    stage["volatile"] = _volatile(stage["volatile"], own)
    state = {"stage": stage, "link": found["link"], "in_flight": found["in_flight"]}
    return state, {**found["rest"], "made": optimizer["made"]}


def cuts(path: str, manifest: Manifest) -> tuple[Cut, ...]:
    """Returns where a checkpoint cuts the visits of each free-running stage; nothing for a planned run."""
    if "visits-0.safetensors" not in manifest.files:
        return ()
    found = [read(Path(path), "visits", k) for k in range(manifest.K)]
    return tuple(Cut(one["counters"]["ordinal"], one["evaluated"], tuple(one["held"])) for one in found)


def refuse_other(now: Mapping[str, Any] | None, then: Mapping[str, Any] | None, k: int) -> None:
    """Raises UsageError if a stage's optimizer is made otherwise than that of the checkpoint: loading it would hide the difference."""
    if now is None or then is None:
        return
    was = "when the checkpoint was made, and"
    if now["class"] != then["class"]:
        raise UsageError(f"the optimizer of stage {k} was {then['class']} {was} is {now['class']} now: use the same")
    groups = len(then["groups"]), len(now["groups"])
    if groups[0] != groups[1]:
        raise UsageError(f"the optimizer of stage {k} had {groups[0]} parameter groups {was} has {groups[1]} now: use the same")
    for one, other in zip(now["groups"], then["groups"], strict=True):
        for name in sorted(one.keys() & other.keys()):
            if one[name] != other[name]:
                raise UsageError(f"{name} of the optimizer was {other[name]!r} {was} is {one[name]!r} now: use the same")


def _renamed(tensors: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): one for name, one in tensors.items()}


def _volatile(found: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {part: _renamed(own, names if part == "module" else {}) for part, own in found.items()}


def _original(weights: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], k: int) -> dict[str, Tensor]:
    """Returns the tensors of module and head by their names in the unsplit model."""
    module = _renamed(weights["module"], names)
    head = {f"heads.{k}.{name}": one for name, one in weights["head"].items()}
    return {name: one for name, one in {**module, **head}.items() if isinstance(one, Tensor)}


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with a memory of their own each, as the file format wants it: tied weights are written twice."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def _moved(tree: Any, device: torch.device) -> Any:
    match tree:
        case Tensor():
            return tree.to(device)
        case dict():
            return {key: _moved(value, device) for key, value in tree.items()}
        case list() | tuple():
            return type(tree)(_moved(value, device) for value in tree)
        case _:
            return tree
