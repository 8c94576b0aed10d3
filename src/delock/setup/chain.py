"""What the atoms of a stage hold together: one after the other in its forward, and in the other order, each freed, in its backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from delock.nets.observe import AtomMemory


@dataclass(eq=False)
class Storage:
    """Memory of a tensor between two atoms. `holder`: the first atom whose graph holds it, where a backward leaves it; None: no graph."""

    size: int
    message: bool = False  # what was received, which is counted as such
    holder: int | None = None

    def hold(self, atom: int) -> None:
        """The graph of one more atom holds it."""
        self.holder = atom if self.holder is None else min(self.holder, atom)


class Chain:
    """The atoms of a stage. `inputs`: bytes of every tensor that it is given; `share`: of the batch that an op is for.

    All bytes are of an op; weights and their gradients do not shrink with it.
    """

    def __init__(self, atoms: Sequence[AtomMemory], inputs: Iterable[int], share: float) -> None:
        self.atoms, self.share = atoms, share
        here = [Storage(size, message=not atoms[0].writes) for size in inputs]  # to write on it the stage makes a copy
        self.storages = list(here)
        before, most, alone = 0, 0, 0
        for i, atom in enumerate(atoms):
            alone = max(alone, _bytes(here) + atom.passing_through)
            lying = [one for one in self.storages if one.holder is not None or one in here]
            most = max(most, before + _bytes(lying) + atom.forward)
            before += atom.graph
            for storage, kept in zip(here, atom.kept, strict=True):
                if kept:
                    storage.hold(i)
            here = self._behind(i, atom, here)
        self.outputs = [one for i, one in enumerate(here) if one not in here[:i]]
        self.forward = round(share * most)
        self.alone = round(share * alone)  # without a graph
        self.output = round(share * _bytes(self.outputs))
        self.graph = round(share * self._left(len(atoms)))

    def _behind(self, i: int, atom: AtomMemory, given: Sequence[Storage]) -> list[Storage]:
        """The storages of an atom's outputs, some of which may be those of its inputs."""
        found = []
        for output in atom.outputs:
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
        return sum(atom.graph for atom in self.atoms[:n]) + _bytes(between)

    def backward(self, *, frees: bool) -> int:
        """The most in a backward above its begin; `frees`: the graph goes as it is used, else it is needed once more."""
        return round(max(map(sum, self._back(frees))))

    def turned(self, *, frees: bool) -> int:
        """The same without gradients of weights."""
        return round(max(passing for passing, _ in self._back(frees)))

    def _back(self, frees: bool) -> Iterator[tuple[float, float]]:
        """At every atom of a backward, above its begin: activations and errors, gradients of weights."""
        whole, n = self._left(len(self.atoms)), len(self.atoms)
        yield self.share * self.atoms[-1].losing, 0
        behind = 0  # gradients of the weights of atoms behind
        for i in reversed(range(n)):
            atom = self.atoms[i]
            own = atom.loss + atom.backward if i == n - 1 else atom.passing  # above the atom's own graph
            own += 0 if frees else atom.retaining - atom.passing
            gradients = min(own, atom.weights)
            yield self.share * (own - gradients - (whole - self._left(i + 1)) * frees), gradients + behind
            behind += atom.weights

    @property
    def flows(self) -> int:
        """Errors into layers with weights."""
        return round(self.share * sum(atom.flows for atom in self.atoms))

    @property
    def layered(self) -> int:
        """Of the graph, what nothing but layers with weights hold."""
        return round(self.share * sum(atom.layered for atom in self.atoms))


def _bytes(storages: Iterable[Storage]) -> int:
    return sum(one.size for one in storages if not one.message)
