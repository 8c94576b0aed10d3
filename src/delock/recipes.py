"""Offers optimizers, learning rates and metrics as small picklable values, ready for `fit`."""

from __future__ import annotations

import torch

from delock.optim.factories import SGD, Adam, AdamW, NAdamW, decays
from delock.optim.feedback import error_feedback
from delock.optim.muon import muon
from delock.optim.rates import PipeMare, Schedule
from delock.optim.soap import soap
from delock.optim.spike import scadamw, scsgd

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "NAdamW",
    "PipeMare",
    "Schedule",
    "accuracy",
    "decays",
    "error_feedback",
    "muon",
    "scadamw",
    "scsgd",
    "soap",
]


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Returns the share of the rows of (B, classes) whose largest entry is at their (B,) label."""
    return float((outputs.argmax(1) == targets).double().mean())
