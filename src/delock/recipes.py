"""Offers optimizers, learning rates and metrics as small picklable values, ready for `fit`."""

from __future__ import annotations

import torch

from delock.optim.factories import SGD, Adam, AdamW, decays
from delock.optim.rates import Schedule

__all__ = ["SGD", "Adam", "AdamW", "Schedule", "accuracy", "decays"]


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Returns the share of the rows of (B, classes) whose largest entry is at their (B,) label."""
    return float((outputs.argmax(1) == targets).double().mean())
