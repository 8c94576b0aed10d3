"""Holds the facts of data that a model is built for, and says which of them are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from delock.errors import UsageError

if TYPE_CHECKING:
    from delock.data import Data, TextData

    Loaded: TypeAlias = "Data | TextData | OwnData"

SIZES = ("classes", "channels", "image_size")  # that a network for images is built for


@dataclass(frozen=True)
class Facts:
    """Holds what data tells a model; None is unknown, or means nothing for such data."""

    classes: int | None = None
    channels: int | None = None
    image_size: int | None = None
    vocabulary: int | None = None
    context: int | None = None

    def known(self) -> dict[str, int]:
        """Returns those that are known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class OwnData:
    """Holds data that a function of the user has returned: a loader, test data as `fit` takes them, the loss, and facts it gave.

    Without a loss the model computes its own.
    """

    train: Any
    test: Any
    loss: Any
    facts: Facts
    name: str


def facts(data: Loaded) -> Facts:
    """Returns the facts of loaded data."""
    from delock.data import TextData

    if isinstance(data, TextData):
        return Facts(vocabulary=data.vocabulary, context=data.context)
    return data.facts if isinstance(data, OwnData) else Facts(data.classes, data.channels, data.image_size)


def wanted(model: str, of: Facts, *names: str) -> Mapping[str, int]:
    """Returns these facts. Raises UsageError, for data of the user's, if they are not known."""
    known = of.known()
    if missing := [name for name in names if name not in known]:
        raise UsageError(
            f"{model} is built for the {missing[0].replace('_', ' ')} of the data, which the function of the data does not say: "
            f"let it return a dict with train, test, loss and {missing[0]}"
        )
    return {name: known[name] for name in names}
