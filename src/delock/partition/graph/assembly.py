"""Puts a piece together from parts of the model: its own modules, parameters and buffers, and copies of what others have, too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from delock.partition.graph.segment import Computation, Segment
from delock.partition.graph.traced import lookup

Source: TypeAlias = str | Tensor
"""A path in the model, or a constant of its graph. Under another path than its own, what the model has is copied."""


def assembled(model: nn.Module, parts: Mapping[str, Source], does: Mapping[bool, Computation]) -> Segment:
    """Returns the piece that computes this, in both modes, with its parts by their paths in it."""
    return Segment({path: of_model(model, path, source) for path, source in parts.items()}, does)


def of_model(model: nn.Module, path: str, source: Source) -> Any:
    """Returns a part as a Segment takes it."""
    if isinstance(source, Tensor):
        return source.clone(), False
    value = lookup(model, source)
    if path != source:
        return value.clone(), False
    return value if isinstance(value, nn.Module | nn.Parameter) else (value, _persists(model, path))


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yields parameters and buffers."""
    return itertools.chain(module.parameters(), module.buffers())


def _persists(model: nn.Module, path: str) -> bool:
    """Returns True for a buffer that is in the state dict."""
    owner, _, last = path.rpartition(".")
    return last not in model.get_submodule(owner)._non_persistent_buffers_set
