"""Defines what a run trains: a GPT on tiny-shakespeare or a ResNet-20 on CIFAR-10, through `delock.fit`, and the record of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from time import perf_counter, process_time
from typing import Any, ClassVar

import torch
from rows import Run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.data import Data, TextData, load, load_text
from delock.errors import NonFinite, UsageError
from delock.nets import bits, build, gpt, nats
from delock.recipes import Schedule, accuracy
from delock.records import Event, Result

TENTHS = 10  # of the run, whose mean training losses are recorded
GROUPS = 8  # of channels, in group norm


def home() -> Path:
    """Returns the folder of the data. Raises UsageError if it is not named."""
    if "DELOCK_DATA" not in os.environ:
        raise UsageError("DELOCK_DATA names no folder: set it to the one with tinyshakespeare.txt, and with CIFAR-10 as train/ and test/")
    return Path(os.environ["DELOCK_DATA"])


@dataclass(frozen=True)
class Task:
    """Holds a length and a schedule. `cuts`: for every K, the first layer of each stage but the first, by name or index."""

    updates: int
    warmup: int
    floor: float
    batch: int
    evaluations: int
    cuts: tuple[tuple[int, tuple[str | int, ...]], ...]

    unit = "bits per character"
    score = "bits"  # the metric; less is better
    clip: ClassVar[float | None] = None  # the largest norm of a gradient

    @property
    def schedule(self) -> Schedule:
        """Returns the course of the rate."""
        return Schedule("cosine", self.updates, self.warmup, floor=self.floor)

    def settings(self, run: Run) -> dict[str, Any]:
        """Returns all that decides the numbers of a run, as plain values."""
        own = {name: value for name, value in asdict(self).items() if name != "cuts"}
        return {"task": type(self).__name__, **own, "cuts": dict(self.cuts)[run.row.K], **run.settings()}

    def fit(self, run: Run, *, batches: int = 0, callbacks: Sequence[Callable[[Event], None]] = ()) -> Result:
        """Trains; `batches` ends a trial of the speed early, without evaluation."""
        given = self.workload(run.seed)
        length = batches or self.updates
        return delock.fit(
            given.pop("model"),
            given.pop("train"),
            None if batches else given.pop("test"),
            **{name: value for name, value in given.items() if name != "test"},
            method=run.row.make_method(),
            optimizer=run.row.factory(run.rate),
            schedule=self.schedule,
            cuts=dict(self.cuts)[run.row.K],
            batches=length,
            clip=self.clip,
            eval_every=-(-self.updates // self.evaluations),
            seed=run.seed,
            workers="inline",
            report=delock.Report(log_every=1 if batches else length),
            callbacks=callbacks,
        )

    def workload(self, seed: int) -> dict[str, Any]:
        """Returns the arguments of `fit` that say what is trained on what."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Task):
    """Trains a GPT by characters. Its quality is the mean over fixed held-out windows, spread evenly over the last tenth of the text."""

    depth: int = 6
    width: int = 64
    context: int = 32
    windows: int = 640
    text: str | None = "tinyshakespeare.txt"  # None: the text that comes with Python

    def workload(self, seed: int) -> dict[str, Any]:
        data = _text(self.text, self.context, self.batch, seed, self.updates)
        model = gpt(data.vocabulary, depth=self.depth, width=self.width, context=self.context, seed=seed)
        return {
            "model": model,
            "train": data.train,
            "test": held_out(data, self.windows),
            "loss": nats,
            "metrics": {"bits": bits},
        }


@dataclass(frozen=True)
class Images(Task):
    """Trains ResNet-20 on CIFAR-10, with crops and flips. Its quality is the error on all test images."""

    norm: str = "batch"

    unit = "test error (%)"
    score = "error"

    def workload(self, seed: int) -> dict[str, Any]:
        data = _images(str(home()), self.batch, seed)
        model = build("resnet20", classes=10, in_channels=3, image_size=32, seed=seed)
        return {
            "model": grouped(model) if self.norm == "group" else model,
            "train": data.train,
            "test": data.test,
            "loss": cross_entropy,
            "metrics": {"error": error},
            "execution": delock.Execution(layout="channels-last"),
        }


def error(outputs: Tensor, targets: Tensor) -> float:
    """Returns the share of wrong labels in per cent."""
    return 100 * (1 - accuracy(outputs, targets))


@cache
def _text(name: str | None, context: int, batch: int, seed: int, batches: int) -> TextData:
    path = None if name is None else home() / name
    return load_text(path, context=context, batch_size=batch, seed=seed, batches_per_epoch=batches)


@cache
def _images(folder: str, batch: int, seed: int) -> Data:
    return load("folder", data_dir=folder, batch_size=batch, test_batch_size=500, seed=seed)


def held_out(data: TextData, windows: int) -> list[tuple[Tensor, Tensor]]:
    """Returns windows of the validation text, spread evenly over it, in batches of at most 160."""
    inputs, targets = (torch.cat(whole) for whole in zip(*data.test.epoch(0), strict=True))  # (N, T)
    chosen = torch.linspace(0, len(inputs) - 1, windows).long()
    return list(zip(inputs[chosen].split(160), targets[chosen].split(160), strict=True))


def grouped(model: nn.Module) -> nn.Module:
    """Puts group norms in the place of a model's batch norms."""
    for owner in list(model.modules()):
        for name, child in owner.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(owner, name, nn.GroupNorm(GROUPS, child.num_features))
    return model


def trained(task: Task, run: Run) -> dict[str, Any]:
    """Makes a run and returns its record: the settings, the score (none if it diverged), what it was on the way, and seconds."""
    torch.set_num_threads(1)
    begun, busy = perf_counter(), process_time()
    try:
        found = _numbers(task, task.fit(run))
    except NonFinite as failure:
        found = {"score": None, "diverged": str(failure)[:200]}
    seconds = {"seconds": round(perf_counter() - begun, 1), "cpu_seconds": round(process_time() - busy, 1)}
    return {"settings": task.settings(run), **found, **seconds, "torch": torch.__version__}


def _numbers(task: Task, result: Result) -> dict[str, Any]:
    on_the_way = [(e.batches, _finite(e.metrics[task.score])) for e in result.evaluations]
    losses, size = result.losses, -(-len(result.losses) // TENTHS)
    found = {"score": on_the_way[-1][1], "evaluations": on_the_way}
    diverged = {"diverged": "the last evaluation is no number"} if found["score"] is None else {}
    return {**found, **diverged, "training_loss": [_finite(fmean(losses[i : i + size])) for i in range(0, len(losses), size)]}


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
