"""Turns pieces of a model into plain values and back: sources of programs, and what their names mean, by name. Nothing is pickled."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from delock.partition.graph.assembly import Source, assembled
from delock.partition.graph.cutter import Piece
from delock.partition.graph.guards import Guards
from delock.partition.graph.refusals import Obstacle
from delock.partition.graph.regions import Region
from delock.partition.graph.segment import Computation, Program, computation
from delock.partition.graph.split import Split
from delock.partition.graph.traceable import Apply
from delock.partition.traces.description import named

MODES = (True, False)


class UnstorableError(Exception):
    """Raised for what has no stored form; then a trace is not kept."""


def stored(split: Split) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns a split as plain values, without the structures of its outputs, and its constants by name. Raises UnstorableError."""
    constants = dict[str, Tensor]()
    found = [_piece(piece, f"{i}.", constants) for i, piece in enumerate(split.pieces)]
    refused = [asdict(one) for one in split.refused]
    form = {"pieces": found, "how": split.how, "checksum": split.checksum, "told": split.told, "refused": refused}
    return form, constants


def restored(model: nn.Module, form: Mapping[str, Any], constants: Mapping[str, Tensor]) -> Split:
    """Returns the split again, with parts of this model, and without the structures."""
    made = [_made(model, one, f"{i}.", constants) for i, one in enumerate(form["pieces"])]
    refused = [Obstacle(**one) for one in form["refused"]]
    return Split(made, {}, form["how"], form["checksum"], refused, form["told"], kept=True)


def _piece(piece: Piece, prefix: str, constants: dict[str, Tensor]) -> dict[str, Any]:
    for path, source in piece.parts.items():
        if isinstance(source, Tensor):
            if source.layout != torch.strided or not source.is_contiguous() or source.requires_grad:
                raise UnstorableError(f"the constant {path}")
            constants[prefix + path] = source
    parts = [(path, None if isinstance(source, Tensor) else source) for path, source in piece.parts.items()]
    does = [_computation(computation(piece.module, mode)) for mode in MODES]
    return {"begins": piece.begins, "also": piece.also, "ties": piece.ties, "parts": parts, "does": does}


def _made(model: nn.Module, form: Mapping[str, Any], prefix: str, constants: Mapping[str, Tensor]) -> Piece:
    parts: dict[str, Source] = {path: constants[prefix + path] if source is None else source for path, source in form["parts"]}
    module = assembled(model, parts, {mode: _computed(one) for mode, one in zip(MODES, form["does"], strict=True)})
    return Piece(form["begins"], module, tuple(form["also"]), tuple((name, size) for name, size in form["ties"]), parts)


def _computation(does: Computation) -> dict[str, Any]:
    handed, own = list(does.handed.items()), list(does.own.items())
    return {"program": _program(does.program), "handed": handed, "weights": sorted(does.weights), "own": own}


def _computed(form: Mapping[str, Any]) -> Computation:
    return Computation(_compiled(form["program"]), dict(form["handed"]), frozenset(form["weights"]), dict(form["own"]))


def _program(program: Program) -> dict[str, Any]:
    return {"source": program.source, "names": {name: _reference(value) for name, value in program.names.items()}}


def _compiled(form: Mapping[str, Any]) -> Program:
    return Program(form["source"], {name: _meant(one) for name, one in form["names"].items()})


def _reference(value: Any) -> list[Any]:
    """Returns what says which object a program means. Raises UnstorableError."""
    match value:
        case ModuleType():
            return ["module", value.__name__]
        case torch._ops.OpOverload():
            return ["operation", str(value)]
        case float():
            return ["number", repr(value)]
        case torch.dtype() | torch.layout() | torch.memory_format():
            return ["name", "torch", str(value).removeprefix("torch.")]
        case torch.device():
            return ["device", str(value)]
        case Guards():
            ranges = [(name, least, repr(most)) for name, (least, most) in value.ranges.items()]
            return ["guards", value.sizes, [_reference(one) for one in value.dtypes], ranges, value.conditions]
        case Region():
            return ["region", value.number, value.kind, [_option(one) for one in value.options], _program(value.program)]
        case Apply():
            return ["apply", *_name(value.of)]
        case _ if value is NoneType:
            return ["name", "types", "NoneType"]
    return ["name", *_name(value)]


def _name(value: Any) -> tuple[str, str]:
    """Returns module and name under which a function or class can be found again."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module not in sys.modules or named(module, name) is not value:
        raise UnstorableError(f"a program uses {value!r}")
    return module, name


def _option(value: Any) -> Any:
    return _reference(value) if isinstance(value, torch.dtype) else value


def _meant(form: Any) -> Any:
    """Returns the object that `_reference` named."""
    match form:
        case ["module", name]:
            return import_module(name)
        case ["operation", name]:
            found: Any = torch.ops
            for part in name.split("."):
                found = getattr(found, part)
            return found
        case ["number", text]:
            return float(text)
        case ["device", text]:
            return torch.device(text)
        case ["name", module, name]:
            return _found(module, name)
        case ["guards", sizes, dtypes, ranges, conditions]:
            known = {name: (least, float(most)) for name, least, most in ranges}
            return Guards(tuple(map(tuple, sizes)), tuple(map(_meant, dtypes)), known, tuple(conditions))
        case ["region", number, kind, options, program]:
            return Region(number, kind, tuple(_meant(one) if isinstance(one, list) else one for one in options), _compiled(program))
        case ["apply", module, name]:
            return Apply(_found(module, name))
    raise AssertionError(form)


def _found(module: str, name: str) -> Any:
    import_module(module)
    return named(module, name)
