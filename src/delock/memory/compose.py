"""Joins the measured layers of a stage: their forwards one after the other, and their backwards in reverse, each freed after its use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from delock.partition.layer_memory import LayerMemory


@dataclass(eq=False)
class Storage:
    """Describes the memory of a tensor between two layers.

    `holder`: the first layer whose graph holds it, at which a backward frees it; None if no graph does.
    """

    size: int
    message: bool = False  # it was received, and is counted as a message
    holder: int | None = None

    def hold(self, layer: int) -> None:
        """Notes that the graph of one more layer holds it."""
        self.holder = layer if self.holder is None else min(self.holder, layer)


class StageGraph:
    """Holds the bytes of a stage's layers for one op, above the bytes at the begin of the op.

    inputs: bytes of every tensor that the stage receives. share: the part of a batch that an op is for; weights and their gradients do not
    shrink with it.
    `forward`, `forward_no_grad`: peaks of a forward with and without a graph. `graph`: bytes of the graph at the end of the forward,
    without the stage's input and outputs. `output`: bytes of the outputs.
    """

    def __init__(self, layers: Sequence[LayerMemory], inputs: Iterable[int], share: float) -> None:
        self.layers, self.share = layers, share
        here = [Storage(size, message=not layers[0].writes) for size in inputs]  # a layer that writes into its input gets a copy
        self.storages = list(here)
        before, most, alone = 0, 0, 0
        for i, layer in enumerate(layers):
            alone = max(alone, _bytes(here) + layer.forward_no_grad)
            lying = [one for one in self.storages if one.holder is not None or one in here]
            most = max(most, before + _bytes(lying) + layer.forward)
            before += layer.graph
            for storage, kept in zip(here, layer.kept, strict=True):
                if kept:
                    storage.hold(i)
            here = self._behind(i, layer, here)
        self.outputs = [one for i, one in enumerate(here) if one not in here[:i]]
        self.forward = round(share * most)
        self.forward_no_grad = round(share * alone)  # without a graph
        self.output = round(share * _bytes(self.outputs))
        self.graph = round(share * self._left(len(layers)))

    def _behind(self, i: int, layer: LayerMemory, given: Sequence[Storage]) -> list[Storage]:
        """Returns the storages of a layer's outputs, some of which may be those of its inputs."""
        found = []
        for output in layer.outputs:
            one = Storage(output.size) if output.source is None else given[output.source]
            if output.source is None:
                self.storages.append(one)
            if output.kept:
                one.hold(i)
            found.append(one)
        return found

    def _left(self, n: int) -> int:
        """Returns the bytes that the graphs of the first n layers hold, without the stage's input and outputs."""
        between = [one for one in self.storages if one.holder is not None and one.holder < n and one not in self.outputs]
        return sum(layer.graph for layer in self.layers[:n]) + _bytes(between)

    def backward(self, *, frees: bool) -> int:
        """Returns the peak bytes of a backward above its begin; `frees`: the graph is freed as it is used, else it stays."""
        return round(max(map(sum, self._back(frees))))

    def backward_activations(self, *, frees: bool) -> int:
        """Returns the same peak of activations and errors alone, without gradients of weights."""
        return round(max(passing for passing, _ in self._back(frees)))

    def _back(self, frees: bool) -> Iterator[tuple[float, float]]:
        """Yields at every layer of a backward the bytes above its begin: activations and errors, then gradients of weights."""
        whole, n = self._left(len(self.layers)), len(self.layers)
        yield self.share * self.layers[-1].loss_peak, 0
        behind = 0  # gradients of the weights of later layers
        for i in reversed(range(n)):
            layer = self.layers[i]
            own = layer.loss + layer.backward if i == n - 1 else layer.backward_with_errors  # above the layer's own graph
            own += 0 if frees else layer.backward_retained - layer.backward_with_errors
            gradients = min(own, layer.weights)
            yield self.share * (own - gradients - (whole - self._left(i + 1)) * frees), gradients + behind
            behind += layer.weights

    @property
    def deferred_errors(self) -> int:
        """Returns the bytes of errors that flow into modules with weights."""
        return round(self.share * sum(layer.deferred_errors for layer in self.layers))

    @property
    def weight_layers_graph(self) -> int:
        """Returns the bytes of the graph that only modules with weights hold."""
        return round(self.share * sum(layer.weight_layers_graph for layer in self.layers))


def _bytes(storages: Iterable[Storage]) -> int:
    return sum(one.size for one in storages if not one.message)
