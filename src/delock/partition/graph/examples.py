"""Gives tracing and its proof batches of different sizes, so that what is fixed and what may change can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from delock.tensors import rows

Inputs = tuple[Tensor, ...]
LARGE, FEW = 20_000_000, 3  # parameters, samples


@dataclass(frozen=True)
class Examples:
    """Holds the tensors of batches: the first, one of another size, and a single sample if there can be one."""

    first: Inputs
    other: Inputs
    single: Inputs = ()

    @classmethod
    def by_rows(cls, inputs: Sequence[Tensor], count: int, model: nn.Module) -> Examples:
        """Returns parts of a batch of `count` samples; of one sample, the same one several times. A large model gets few."""
        few = min(count, FEW) if is_large(model) else count
        return cls(_resized(inputs, count, max(2, few)), _resized(inputs, count, 3 if few < 3 else few - 1), _resized(inputs, count, 1))


def is_large(model: nn.Module) -> bool:
    """Returns True for a model that is traced and tried with a few samples, and compared in parts: time and memory matter there."""
    return sum(weight.numel() for weight in model.parameters() if not is_lazy(weight)) > LARGE


def _resized(inputs: Sequence[Tensor], count: int, wanted: int) -> Inputs:
    if wanted <= count:
        return tuple(rows(x, 0, wanted, count).clone() for x in inputs)
    return tuple(torch.cat([x, *[x[:1]] * (wanted - count)]) if x.dim() and len(x) == count else x.clone() for x in inputs)
