"""Offers optimizers, learning rates and metrics as small picklable values, ready for `fit`, and the length of a run in updates."""

from __future__ import annotations

from typing import Any

import torch

from delock.data.iterable import as_loader
from delock.errors import UsageError
from delock.methods import Method, make
from delock.optim.factories import SGD, Adam, AdamW, NAdamW, decays
from delock.optim.feedback import error_feedback
from delock.optim.muon import muon
from delock.optim.rates import PipeMare, Plateau, Schedule
from delock.optim.soap import soap
from delock.optim.spike import scadamw, scsgd
from delock.options import fits

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "NAdamW",
    "PipeMare",
    "Plateau",
    "Schedule",
    "accuracy",
    "decays",
    "error_feedback",
    "muon",
    "scadamw",
    "scsgd",
    "soap",
    "updates",
]


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Returns the share of the rows of (B, classes) whose largest entry is at their (B,) label."""
    return float((outputs.argmax(1) == targets).double().mean())


def updates(method: str | Method, loader: Any, epochs: int) -> int:
    """Returns the updates that every stage makes in a run of `fit` with this method, training data and epochs: what schedules count in.

    An incomplete last group of batches (adl) makes an update, too. A free-running stage goes on until it has made this many.
    """
    if not fits(epochs, int) or epochs < 1:
        raise UsageError(f"epochs is {epochs!r}, but it must be a whole number, at least 1")
    chosen = make(method) if isinstance(method, str) else method
    if not isinstance(chosen, Method):
        raise UsageError(f"method is {method!r}, but it must be a method of delock.methods, as delock.FDG(), or its name")
    batches = epochs * len(as_loader(loader))
    return -(-batches // chosen.batches_per_update)
