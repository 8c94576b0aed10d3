"""Turns what the ranks of torchrun tell each other into bytes and back: plain values, tensors, and the classes that are listed here.

    plain values, lists, tuples, dicts, tensors     as in a checkpoint: JSON, with the tensors behind it as in a message between stages
    an object of one of CLASSES                     {"class": its name, "fields": {name: value}}

Anybody who reaches the store of a rendezvous, or a connection of gloo, may have written what comes. So it is read as data: a class is
looked up by name, gets exactly its fields, and each must be of its declared type.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import torch
from torch import Tensor

from delock.checkpoints.encoding import decode, encode
from delock.checkpoints.manifest import Manifest
from delock.errors import DelockError, LinkError
from delock.launch.ambient import Ambient
from delock.links.message import Message, MessageKind, MessageName
from delock.links.wire import DTYPES
from delock.links.wire import pack as pack_message
from delock.links.wire import unpack as unpack_message
from delock.ops import Backward, Evaluate, Forward, Update, Weights
from delock.options import Checkpoint, fits
from delock.records import (
    CheckpointRecord,
    Cut,
    EvaluationRecord,
    Resumed,
    StagePrediction,
    StageReport,
    Started,
    StepRecord,
    Traffic,
    Visit,
    VisitsRecord,
)
from delock.run.job import StageResult
from delock.run.survival.resume import Begin
from delock.timeline import Slowdown, Span

CLASSES: Mapping[str, type[Any]] = MappingProxyType(
    {
        one.__name__: one
        for one in (
            *(Started, StagePrediction, StepRecord, EvaluationRecord, Visit, VisitsRecord, CheckpointRecord, Resumed, Cut),
            *(StageResult, StageReport, Traffic, Span, Slowdown, Forward, Evaluate, Backward, Update, Weights),
            *(Begin, Manifest, Checkpoint, Ambient),
        )
    }
)
CPU = torch.device("cpu")


def pack(value: object) -> bytes:
    """Returns a value as bytes. Raises UsageError for one that is not of these kinds."""
    structure, tensors = encode(_plain(value), "what a stage tells")
    packed, _ = pack_message(MessageName(MessageKind.END), Message(tuple(tensors.values()), json.dumps(structure)))
    return packed.numpy().tobytes()


def unpack(data: bytes) -> Any:
    """Returns the value. Raises LinkError for bytes that `pack` has not made."""
    try:
        packed = torch.frombuffer(bytearray(data), dtype=torch.uint8).clone()
        _, message = unpack_message(packed, CPU)
        return _whole(decode(json.loads(message.targets), {str(i): one for i, one in enumerate(message.values)}))
    except (DelockError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, RecursionError, struct.error) as error:
        raise LinkError(f"what a rank has told cannot be read: {error}") from error


def _plain(value: Any) -> Any:
    """Returns the value without objects."""
    match value:
        case Tensor():
            return value.detach()
        case torch.dtype():
            return {"class": "dtype", "fields": {"name": str(value)[6:]}}
        case Path():
            return str(value)
        case bool() | None:
            return value
        case Integral():  # those of numpy, too
            return int(value)
        case Real():
            return float(value)
        case Mapping():
            return {key: _plain(one) for key, one in value.items()}
        case tuple() | list():
            return type(value)(map(_plain, value)) if type(value) in (tuple, list) else value
        case _ if is_dataclass(value) and CLASSES.get(type(value).__name__) is type(value):
            return {"class": type(value).__name__, "fields": {one.name: _plain(getattr(value, one.name)) for one in fields(value)}}
        case _:
            return value


def _whole(value: Any) -> Any:
    """Returns the value with its objects."""
    match value:
        case {"class": "dtype", "fields": {"name": name}}:
            return DTYPES[name]
        case {"class": str(name), "fields": dict(given), **rest} if not rest:
            return _made(name, {key: _whole(one) for key, one in given.items()})
        case dict():
            return {key: _whole(one) for key, one in value.items()}
        case tuple() | list():
            return type(value)(map(_whole, value))
        case _:
            return value


def _made(name: str, given: Mapping[str, Any]) -> Any:
    kind = CLASSES[name]
    if given.keys() != {one.name for one in fields(kind)}:
        raise TypeError(f"{name} has other fields than {', '.join(map(str, given))}")
    for field, declared in get_type_hints(kind, localns=dict(CLASSES)).items():
        if field in given and not fits(given[field], declared):
            raise TypeError(f"{field} of {name} is {given[field]!r:.80}")
    return kind(**given)
