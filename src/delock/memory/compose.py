"""What the atoms of a stage hold together: one after the other in its forward, and in the other order, each freed, in its backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from delock.partition.layer_memory import LayerMemory


@dataclass(eq=False)
class Storage:
    """Memory of a tensor between two atoms. `holder`: the first atom whose graph holds it, where a backward leaves it; None: no graph."""

    size: int
    message: bool = False  # what was received, which is counted as such
    holder: int | None = None

    def hold(self, layer: int) -> None:
        """The graph of one more atom holds it."""
        self.holder = layer if self.holder is None else min(self.holder, layer)


class StageGraph:
    """The atoms of a stage. `inputs`: bytes of every tensor that it is given; `share`: of the batch that an op is for.

    All bytes are of an op; weights and their gradients do not shrink with it.
    """

    def __init__(self, layers: Sequence[LayerMemory], inputs: Iterable[int], share: float) -> None:
        self.layers, self.share = layers, share
        here = [Storage(size, message=not layers[0].writes) for size in inputs]  # to write on it the stage makes a copy
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
        """The storages of an atom's outputs, some of which may be those of its inputs."""
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
        """What the graphs of the first n atoms hold beside the stage's input and outputs."""
        between = [one for one in self.storages if one.holder is not None and one.holder < n and one not in self.outputs]
        return sum(layer.graph for layer in self.layers[:n]) + _bytes(between)

    def backward(self, *, frees: bool) -> int:
        """The most in a backward above its begin; `frees`: the graph goes as it is used, else it is needed once more."""
        return round(max(map(sum, self._back(frees))))

    def backward_activations(self, *, frees: bool) -> int:
        """The same without gradients of weights."""
        return round(max(passing for passing, _ in self._back(frees)))

    def _back(self, frees: bool) -> Iterator[tuple[float, float]]:
        """At every atom of a backward, above its begin: activations and errors, gradients of weights."""
        whole, n = self._left(len(self.layers)), len(self.layers)
        yield self.share * self.layers[-1].loss_peak, 0
        behind = 0  # gradients of the weights of atoms behind
        for i in reversed(range(n)):
            layer = self.layers[i]
            own = layer.loss + layer.backward if i == n - 1 else layer.backward_with_errors  # above the atom's own graph
            own += 0 if frees else layer.backward_retained - layer.backward_with_errors
            gradients = min(own, layer.weights)
            yield self.share * (own - gradients - (whole - self._left(i + 1)) * frees), gradients + behind
            behind += layer.weights

    @property
    def deferred_errors(self) -> int:
        """Errors into layers with weights."""
        return round(self.share * sum(layer.deferred_errors for layer in self.layers))

    @property
    def weight_layers_graph(self) -> int:
        """Of the graph, what nothing but layers with weights hold."""
        return round(self.share * sum(layer.weight_layers_graph for layer in self.layers))


def _bytes(storages: Iterable[Storage]) -> int:
    return sum(one.size for one in storages if not one.message)
