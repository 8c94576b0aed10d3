"""The network of a run as layers: a chain is taken apart as it is, any other module is traced on a first batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from delock.data.call import Call
from delock.errors import UsageError
from delock.partition.graph.outputs import OnOutput, by_count, own_loss
from delock.partition.graph.split import Split, split
from delock.partition.graph.structure import Structure
from delock.partition.layers import Layer, is_chain, layers
from delock.tensors import Value, tensors

DETECTION = "torchvision.models.detection"
ONE: Structure = ("t", 0)


class Network:
    """Holds a model, and its layers once they are known.

    call: the way in which the model is called with the tensors of a batch, if not with one argument.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        self.model = model
        self.found: list[Layer] | None = layers(model) if is_chain(model) else None
        self.split: Split | None = None

    @property
    def chain(self) -> bool:
        """Returns True for a model that is taken apart without tracing."""
        return is_chain(self.model)

    def layers(self) -> list[Layer]:
        """Returns the layers, after `trace` if the model is no chain."""
        assert self.found is not None
        return self.found

    def trace(self, call: Call, inputs: Value, count: int, stages: int, wanted: Sequence[str] = ()) -> None:
        """Traces a model that is no chain, on a batch of `count` samples. Raises UsageError if it cannot be cut."""
        if self.found is not None:
            return
        assert isinstance(self.model, nn.Module)
        if any(base.__module__.startswith(DETECTION) for base in type(self.model).__mro__):
            raise UsageError(f"a {type(self.model).__name__} detects objects: boxes, whose number follows from values, are out of scope")
        self.split = split(self.model, call, tensors(inputs), count, stages, wanted)
        self.found = [Layer("", piece.module, self.model.training, piece.begins) for piece in self.split.pieces]

    def on_output(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Returns a loss or metric as the last stage calls it."""
        if self.split is None or self.split.structures[True] == self.split.structures[False] == ONE:
            return function
        return OnOutput(function, by_count(self.split.structures))

    def loss(self, given: Callable[[Any, Any], Tensor] | None) -> Callable[[Any, Any], Tensor] | None:
        """Returns the loss as the last stage calls it: the one that is given, or a traced model's own. A chain has none."""
        return self.on_output(given or own_loss) if given or self.split else None
