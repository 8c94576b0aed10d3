"""Defines the anchor: nanoGPT's recipe for CPUs, trained by plain PyTorch, and by `delock.fit` beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from rows import Run
from tasks import Text
from torch import nn

from delock.records import Event

PLAIN = "plain"  # the row without delock


@dataclass(frozen=True)
class Anchor(Text):
    """Trains nanoGPT's network for CPUs, with its recipe; gradients are clipped over the network, or over a stage where it is late."""

    depth: int = 4
    width: int = 128
    context: int = 64
    clip: ClassVar[float | None] = 1.0

    def fit(self, run: Run, *, batches: int = 0, callbacks: Sequence[Callable[[Event], None]] = ()) -> Any:
        if run.row.method != PLAIN:
            return super().fit(run, batches=batches, callbacks=callbacks)
        given, length = self.workload(run.seed), batches or self.updates
        model: nn.Module = given["model"].train()
        optimizer = run.row.factory(run.rate)(list(model.named_parameters()))
        schedule = self.schedule(optimizer)
        losses = []
        for inputs, targets in given["train"].epoch(0):
            optimizer.zero_grad()
            loss = given["loss"](model(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), self.clip or torch.inf)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            for tell in callbacks:
                tell(None)  # type: ignore[arg-type]
            if len(losses) == length:
                break
        return SimpleNamespace(losses=losses, evaluations=[SimpleNamespace(batches=length, metrics={"bits": self.quality(given)})])

    def quality(self, given: dict[str, Any]) -> float:
        """Returns the bits on the held-out windows, as `fit` weighs them."""
        model = given["model"].eval()
        with torch.no_grad():
            found = [(given["metrics"]["bits"](model(inputs), targets), len(inputs)) for inputs, targets in given["test"]]
        return fmean([float(bits) for bits, _ in found], [count for _, count in found])
