"""How much memory every stage will need: what its atoms, its head, its optimizer and its links hold, walked along the plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from delock.codecs import Codec
from delock.codecs.coding import predicted
from delock.nets.measure import AtomCost
from delock.nets.observe import AtomMemory
from delock.setup.chain import Chain
from delock.setup.optimizer import Steps
from delock.setup.spec import Spec
from delock.timeline import Sizes, Way

Outputs = Sequence[tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of every tensor of a message


class Ways:
    """What the links carry: bytes of a message, of its tensors, and how many an end keeps.

    `slots`: per link those of activations and of errors in shared memory, where messages then lie while they are in use; None: no such.
    """

    def __init__(self, spec: Spec, K: int, cut: Sequence[AtomCost], targets: int, slots: Sequence[tuple[int, int]] | None) -> None:
        self.spec, self.K, self.cut, self.targets, self.slots = spec, K, cut, targets, slots
        self.share = 1 / spec.method.parts

    def up(self, link: int) -> Way:
        """Activations with their labels."""
        tensors = self._encoded(self.spec.codec, self.cut[link].outputs)
        return Way(round(self.share * (tensors + self.targets)), self._depth(link))

    def down(self, link: int) -> Way:
        """Errors of the outputs that have one."""
        return Way(round(self.share * self._encoded(self.spec.error_codec, _floating(self.cut[link].outputs))), self._depth(link))

    def received(self, way: Way, codec: Codec | None, outputs: Outputs) -> int:
        """What a message is when it is in use: encoded tensors are decoded beside it."""
        return way.message * (self.slots is None) + (round(self.share * _bytes(outputs)) if codec else 0)

    def shared(self, link: int) -> int:
        """Bytes of the slots of a link; both ends have all of them."""
        if not self.slots:
            return 0
        activations, errors = self.slots[link]
        return activations * self.up(link).message + errors * self.down(link).message

    def _depth(self, link: int) -> int:
        """gloo posts receives ahead and keeps what it has sent; in one process the message is what the other stage has."""
        gloo = self.spec.workers != "inline" and self.slots is None and torch.device(self.spec.device).type == "cpu"
        return self.spec.method.capacity(link, self.K) if gloo else 0

    def _encoded(self, codec: Codec | None, outputs: Outputs) -> float:
        if codec is None:
            return _bytes(outputs)
        return sum(map(sum, (predicted(codec, shape, dtype) for shape, dtype in outputs)))


def stage_sizes(
    spec: Spec, k: int, ways: Ways, atoms: Sequence[AtomCost], head: AtomCost | None, optimizer: Steps | None, batch: Outputs
) -> Sizes | None:
    """What stage k holds; None where something cannot be counted. `batch`: the inputs of the network."""
    memories = [atom.memory for atom in atoms if atom.memory]
    if len(memories) < len(atoms) or (head and not head.memory) or optimizer is None:
        return None
    below, last = (ways.cut[k - 1].outputs if k else batch), k == ways.K - 1
    chain = Chain(memories, [_bytes([one]) for one in below], ways.share)
    up_in, down_in = Way() if k == 0 else ways.up(k - 1), Way() if last else ways.down(k)
    state, step = optimizer
    return Sizes(
        weights=sum(one.weights for one in memories),
        largest=max(one.largest for one in memories),
        state=state,
        step=step,
        input=ways.received(up_in, spec.codec, below) if k else round(_bytes(below) + ways.targets),
        graph=chain.graph,
        output=chain.output,
        delta=round(ways.share * _bytes(_floating(below))) if k else 0,
        error=0 if last else ways.received(down_in, spec.error_codec, _floating(ways.cut[k].outputs)),
        made=0 if last else round(ways.share * _bytes(_floating(ways.cut[k].outputs))),
        forward=chain.forward,
        alone=chain.alone,
        backward=chain.backward(frees=True),
        retaining=chain.backward(frees=False),
        turned=chain.turned(frees=True),
        turning=chain.turned(frees=False),
        flows=chain.flows,
        layered=chain.layered,
        head=_head_peak(head.memory) if head and head.memory else 0,
        head_weights=head.memory.weights if head and head.memory else 0,
        slots=sum(map(ways.shared, range(max(0, k - 1), min(k + 1, ways.K - 1)))),
        feeds=spec.method.parts if k == 0 else 0,
        up_in=up_in,
        up_out=Way() if last else ways.up(k),
        down_in=down_in,
        down_out=Way() if k == 0 else ways.down(k - 1),
    )


def _head_peak(head: AtomMemory) -> int:
    """The most while a head goes forward and backward, the error of the stage's outputs included."""
    chain = Chain([head], [0] * len(head.kept), 1.0)
    return max(chain.forward, chain.graph + chain.output + chain.backward(frees=True))


def _floating(outputs: Outputs) -> Outputs:
    return [(shape, dtype) for shape, dtype in outputs if dtype.is_floating_point or dtype.is_complex]


def _bytes(outputs: Outputs) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in outputs)
