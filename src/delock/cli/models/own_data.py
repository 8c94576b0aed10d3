"""Loads the data that a function of the user's returns, for --data FILE.py:FUNCTION."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from delock.cli.models import own_code
from delock.cli.models.facts import Facts, OwnData
from delock.data.call import Takes
from delock.data.iterable import train_loader
from delock.data.seeding import seeded
from delock.errors import UsageError

PARTS = ("train", "test", "loss")
FORM = "it must return (train, test), (train, test, loss), or a dict with these names"


def load_own(name: str, seed: int, sizes: Mapping[str, tuple[int, int]], batches: int | None) -> OwnData:
    """Returns the data of FILE.py:FUNCTION, called with the seed and the sizes of batches as far as it takes them.

    sizes: by name, as the user has them, with their defaults. batches: of the run, for training data without a length. Raises UsageError
    for a size that was given and is not taken, and for another result than FORM says.
    """
    for size, (value, usual) in sizes.items():
        if value != usual and not own_code.takes(name, size):
            raise UsageError(f"{size.replace('_', '-')} is {value}, but {name} takes no {size}: leave it out, or let the function take it")
    with seeded(seed):
        found = _parts(name, own_code.call(name, {"seed": seed, **{size: value for size, (value, _) in sizes.items()}}))
    told = {fact.name: found.get(fact.name) for fact in fields(Facts)}
    if wrong := next((one for one, value in told.items() if value is not None and (type(value) is not int or value < 1)), None):
        raise UsageError(f"{name} says that {wrong} is {told[wrong]!r}, but it must be a whole number, at least 1")
    train, test = found.get("train"), found.get("test")
    if train is None:
        raise UsageError(f"{name} returned no training data: {FORM}")
    return OwnData(train_loader(train, seed, Takes(), batches), test, found.get("loss"), Facts(**told), name)


def _parts(name: str, result: Any) -> Mapping[str, Any]:
    """Returns what the function has returned by name."""
    if isinstance(result, tuple) and len(result) in (2, 3):
        return dict(zip(PARTS, result, strict=False))
    known = (*PARTS, *(fact.name for fact in fields(Facts)))
    if not isinstance(result, Mapping):
        count = f" of {len(result)}" if isinstance(result, tuple) else ""
        raise UsageError(f"{name} returned a {type(result).__name__}{count}, but {FORM}")
    if strange := next((one for one in result if one not in known), None):
        raise UsageError(f"{name} returned a dict with {strange!r}, but its names are {', '.join(known)}")
    return result
