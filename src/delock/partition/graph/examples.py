"""Gives tracing and its proof batches of different sizes, so that what is fixed and what may change can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from delock.tensors import rows

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Examples:
    """Holds the tensors of batches: the first, one of another size, and a single sample if there can be one."""

    first: Inputs
    other: Inputs
    single: Inputs = ()

    @classmethod
    def by_rows(cls, inputs: Sequence[Tensor], count: int) -> Examples:
        """Returns parts of a batch of `count` samples; of one sample, the same one several times."""
        return cls(
            _resized(inputs, count, max(2, count)), _resized(inputs, count, 3 if count < 3 else count - 1), _resized(inputs, count, 1)
        )


def _resized(inputs: Sequence[Tensor], count: int, wanted: int) -> Inputs:
    if wanted <= count:
        return tuple(rows(x, 0, wanted, count).clone() for x in inputs)
    return tuple(torch.cat([x, *[x[:1]] * (wanted - count)]) if x.dim() and len(x) == count else x.clone() for x in inputs)
