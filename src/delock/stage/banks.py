"""The banks of a stage: copies of its weights, of the current version and of older ones, and weights drawn out from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from delock.stage.module import ModuleFunction, Weights, copies


class Banks:
    """Keeps copies of the weights of `body`, one for all graphs that need the same.

    kept: version -> its weights. drawn: (version, ahead) -> its weights, drawn out.
    """

    def __init__(self, body: ModuleFunction) -> None:
        self.body = body
        self.kept: dict[int, Weights] = {}
        self.drawn: dict[tuple[int, float], Weights] = {}

    def of(self, version: int, newest: int) -> Weights:
        """Returns the weights of a version, which is the newest or has been kept."""
        if version == newest and version not in self.kept:
            self.kept[version] = copies(self.body.weights)
        return self.kept[version]

    def drawn_out(self, version: int, newest: int, ahead: float) -> Weights:
        """Returns w + ahead (w - the weights before the last Update), w those of the version."""
        if (version, ahead) not in self.drawn:
            base = self.body.weights if version == newest else self.kept[version]
            self.drawn[version, ahead] = _drawn_out(base, self.kept[version - 1], ahead)
        return self.drawn[version, ahead]

    def forget(self) -> None:
        """Drops all copies, as the weights have been set."""
        self.kept, self.drawn = {}, {}

    def before_update(self, newest: int, banks: int) -> None:
        """Sees to it that `banks` older versions are there after the Update that replaces the newest, and drops all others."""
        if banks:
            self.of(newest, newest)
        oldest = newest + 1 - banks
        self.kept = {version: weights for version, weights in self.kept.items() if version >= oldest}
        self.drawn = {(version, ahead): weights for (version, ahead), weights in self.drawn.items() if version > oldest}

    @contextmanager
    def in_place(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Has these values in the weights' own storage within the block, unseen by autograd and by graphs that live on."""
        own = self.body.weights
        now = {name: w.detach().clone() for name, w in own.items()}
        _overwrite(own, weights)
        try:
            yield
        finally:
            _overwrite(own, now)


def _drawn_out(weights: Mapping[str, Tensor], before: Mapping[str, Tensor], ahead: float) -> Weights:
    with torch.no_grad():
        return {name: nn.Parameter(w + ahead * (w - before[name])) for name, w in weights.items()}


def _overwrite(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        weights[name].data.copy_(value.data)
