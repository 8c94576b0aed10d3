"""Ranks of torchrun tell each other data: everything comes back as it was, and nothing else is read."""

from __future__ import annotations

import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import delock
from delock.checkpoints.manifest import Manifest
from delock.errors import LinkError, UsageError
from delock.launch.ambient import Ambient
from delock.links.message import Message, MessageKind, MessageName
from delock.links.wire import pack as pack_message
from delock.ops import Backward, Evaluate, Forward, Update, Weights
from delock.records import CheckpointRecord, Cut, EvaluationRecord, Event, Resumed, StepRecord, Visit, VisitsRecord
from delock.run.survival.resume import Begin
from delock.run.telling import CLASSES, pack, unpack
from delock.timeline import Slowdown, Span

from points import SGD, network, test_data, train_data, weighted

pytestmark = pytest.mark.usefixtures("own_random")


def heard(**more: Any) -> tuple[delock.Result, list[Event]]:
    """A run with everything that a run reports."""
    events: list[Event] = []
    result = delock.fit(
        network(), train_data(), test_data(), loss=weighted, method="fdg", optimizer=SGD, epochs=1, cuts=[4], workers="inline",
        report=delock.Report(trace=True, log_every=1), callbacks=[events.append], **more,
    )  # fmt: skip
    return result, events


MANIFEST = Manifest(3, 4, 2, 1, {"loss": 0.5}, (3, 2), {"torch": "2", "threads": 1}, {"cuts": [4], "clip": None}, {"a": (1, 2)})
VALUES: list[Any] = [
    (None, True, -3, math.inf, "text", [1, (2, {})], {1: 2, "x": {"class": "a metric of this name"}}),
    StepRecord(1, 0.5, math.inf, 0.1, 8, 0.25),
    EvaluationRecord(1, 1.0, 0.5, 0.25, {"accuracy": 0.5}, 0.1, 8),
    VisitsRecord(0, (Visit(0, 0, True, 0), Visit(1, 0, False, 2, True, False, 0.5, 1.5))),
    CheckpointRecord(4, "a/b", 10, 0.5, "", True),
    Resumed(4, 3, 1, "a", ("note",), (Cut(1, 2, (3, 4)),)),
    Span(0, Backward(3, loss=1), 0.0, 1.0, 2, 3, 0.5),
    [Forward(1, True, 1, Weights(1, 1.5)), Evaluate(1), Update()],
    Slowdown(2.0, 0.5, 1, 3),
    Begin("a", MANIFEST),
    delock.Checkpoint("a", every="10m", best="min:loss"),
    Ambient.here(),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda one: type(one).__name__)
def test_a_value_comes_back(value: Any) -> None:
    assert unpack(pack(value)) == value


def test_all_that_a_run_reports_comes_back() -> None:
    result, events = heard()
    assert unpack(pack(events)) == events
    assert unpack(pack((result.started, result.stages, list(map(list, result.spans))))) == (
        result.started,
        result.stages,
        list(map(list, result.spans)),
    )
    named = {type(one).__name__ for one in events} | {"StageReport", "Traffic", "StagePrediction", "Span"}
    assert named <= CLASSES.keys()


def test_tensors_come_back() -> None:
    value = {"w": torch.randn(3, 4).t(), "n": torch.tensor(3), "z": torch.randn(2, dtype=torch.complex64), "none": torch.empty(0, 2)}
    found = unpack(pack({**value, "again": [value["w"]]}))
    assert all(torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in value.items())
    assert found["again"][0] is found["w"]


def test_numbers_are_plain_ones() -> None:
    found = unpack(pack([np.float64(0.5), np.float32(0.25), np.int64(3), True]))
    assert found == [0.5, 0.25, 3, True]
    assert [type(one) for one in found] == [float, float, int, bool]


def test_a_path_is_a_text() -> None:
    assert unpack(pack(delock.Checkpoint(Path("a")))) == delock.Checkpoint("a")


def test_what_cannot_be_told_is_named() -> None:
    with pytest.raises(UsageError, match=r"what a stage tells\['f'\] is a function"):
        pack({"f": heard})


class Shout:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code has run')",)


def told(structure: Any, *tensors: torch.Tensor) -> bytes:
    return pack_message(MessageName(MessageKind.END), Message(tensors, json.dumps(structure)))[0].numpy().tobytes()


def entry(name: str, fields: list[list[Any]]) -> Any:
    return {"dict": [["class", name], ["fields", {"dict": fields}]]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"x" * 300,
        pickle.dumps(Shout()),
        pack(1)[:-70],
        told(entry("Popen", [["args", "true"]])),
        told(entry("StepRecord", [["batches", 1]])),
        told(entry("Cut", [["ordinal", "1"], ["evaluated", 2], ["held", {"tuple": []}]])),
        told(entry("Cut", [["ordinal", 1], ["evaluated", 2], ["held", {"tuple": []}], ["more", 1]])),
        told(entry("Checkpoint", [["folder", ""]])),
        told(entry("dtype", [["name", "load"]])),
        told({"tensor": "7", "strides": []}),
        told({"tensor": "0", "strides": [2**40]}, torch.zeros(2)),
    ],
    ids=range(13),
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(LinkError, match="what a rank has told cannot be read"):
        unpack(data)


def test_bytes_that_were_changed_run_nothing_and_end_nothing() -> None:
    """A thousand times, at random places: they are refused, or are read as another value of the same kinds."""
    whole, draw = pack((VALUES[1:9], torch.ones(4))), random.Random(0)
    refused = 0
    for _ in range(1000):
        changed = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        try:
            unpack(bytes(changed))
        except LinkError:
            refused += 1
    assert refused > 500
