"""Splits a model, or takes its pieces from an earlier run that has traced and proved the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import nn

from delock.data.call import Call
from delock.launch import allocator
from delock.partition.graph.cutter import ENOUGH
from delock.partition.graph.examples import Examples, is_large
from delock.partition.graph.generators import generators_kept
from delock.partition.graph.proof import structures_once_more
from delock.partition.graph.split import Split, split
from delock.partition.traces.stored_form import UnstorableError, restored, stored
from delock.partition.traces.trace_files import folder, read_trace, write_trace
from delock.partition.traces.trace_key import trace_key


def kept_split(model: nn.Module, call: Call, given: Examples, stages: int, wanted: Sequence[str] = (), enough: float = ENOUGH) -> Split:
    """Returns what `split` returns. What it has found is kept, if the model can be described with certainty.

    Pieces of an earlier run take a step before they are used. If they are not the model any more, it is traced anew. Either way
    generators of random numbers are left as they were.
    """
    place = folder()
    key = trace_key(model, call, given, stages, tuple(wanted), enough) if place else ""
    with generators_kept(model), allocator.returning() if is_large(model) else nullcontext():
        if place and key and (kept := _earlier(place, key, model, call, given)):
            return kept
        found = split(model, call, given, stages, wanted, enough)
    if place and key:
        _keep(place, key, found)
    return found


def _keep(place: Path, key: str, found: Split) -> None:
    try:
        form, constants = stored(found)
    except UnstorableError:
        return
    write_trace(place, key, form, constants)


def _earlier(place: Path, key: str, model: nn.Module, call: Call, given: Examples) -> Split | None:
    """Returns the pieces that an earlier run has kept, if there are some and they compute what the model computes."""
    kept = read_trace(place, key)
    if kept is None:
        return None
    try:
        found = restored(model, *kept)
        found.structures = structures_once_more(model, call, [piece.module for piece in found.pieces], given.first, found.told)
    except Exception:  # whatever is wrong with it or with the model, tracing it anew will tell
        return None
    return found if found.structures else None
