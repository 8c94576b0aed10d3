"""How much memory every stage will need: what its atoms, its head, its optimizer and its links hold, walked along the plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from delock.codecs import Codec
from delock.memory.compose import StageGraph
from delock.memory.peaks import LinkBytes, StageBytes
from delock.methods import Method
from delock.options import Compression
from delock.partition.layer_memory import LayerMemory
from delock.partition.measure import LayerCost

Outputs = Sequence[tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of every tensor of a message


class RunLinks:
    """What the links carry: bytes of a message, of its tensors, and how many an end keeps.

    cut: the layers whose outputs are sent; targets: bytes of a batch's labels. slots: per link those of activations and of errors in
    shared memory, where messages then lie while they are in use; None where links are of another kind. ahead: such a link posts receives
    ahead, and keeps what it has sent, as gloo does.
    """

    def __init__(
        self,
        method: Method,
        codecs: Compression,
        cut: Sequence[LayerCost],
        targets: int,
        slots: Sequence[tuple[int, int]] | None,
        *,
        ahead: bool,
    ) -> None:
        self.method, self.K, self.cut, self.targets, self.slots = method, len(cut) + 1, cut, targets, slots
        self.codec, self.error_codec = codecs.activations, codecs.errors
        self.share, self.ahead = 1 / method.micro_batches, ahead and slots is None

    def up(self, link: int) -> LinkBytes:
        """Activations with their labels."""
        tensors = self._encoded(self.codec, self.cut[link].outputs)
        return LinkBytes(round(self.share * (tensors + self.targets)), self._depth(link))

    def down(self, link: int) -> LinkBytes:
        """Errors of the outputs that have one."""
        return LinkBytes(round(self.share * self._encoded(self.error_codec, _floating(self.cut[link].outputs))), self._depth(link))

    def received(self, way: LinkBytes, codec: Codec | None, outputs: Outputs) -> int:
        """What a message is when it is in use: encoded tensors are decoded beside it."""
        return way.message * (self.slots is None) + (round(self.share * _bytes(outputs)) if codec else 0)

    def shared(self, link: int) -> int:
        """Bytes of the slots of a link; both ends have all of them."""
        if not self.slots:
            return 0
        activations, errors = self.slots[link]
        return activations * self.up(link).message + errors * self.down(link).message

    def _depth(self, link: int) -> int:
        """In one process the message is what the other stage has."""
        return self.method.capacity(link, self.K) if self.ahead else 0

    def _encoded(self, codec: Codec | None, outputs: Outputs) -> float:
        if codec is None:
            return _bytes(outputs)
        return sum(map(sum, (codec.predicted(shape, dtype) for shape, dtype in outputs)))


def stage_sizes(
    k: int, ways: RunLinks, layers: Sequence[LayerCost], head: LayerCost | None, optimizer: tuple[int, int] | None, batch: Outputs
) -> StageBytes | None:
    """What stage k holds; None where something cannot be counted. `batch`: the inputs of the network."""
    memories = [layer.memory for layer in layers if layer.memory]
    if len(memories) < len(layers) or (head and not head.memory) or optimizer is None:
        return None
    below, last = (ways.cut[k - 1].outputs if k else batch), k == ways.K - 1
    chain = StageGraph(memories, [_bytes([one]) for one in below], ways.share)
    up_in, down_in = LinkBytes() if k == 0 else ways.up(k - 1), LinkBytes() if last else ways.down(k)
    state, step = optimizer
    return StageBytes(
        weights=sum(one.weights for one in memories),
        largest=max(one.largest for one in memories),
        state=state,
        optimizer_step=step,
        input=ways.received(up_in, ways.codec, below) if k else round(_bytes(below) + ways.targets),
        graph=chain.graph,
        output=chain.output,
        delta=round(ways.share * _bytes(_floating(below))) if k else 0,
        error=0 if last else ways.received(down_in, ways.error_codec, _floating(ways.cut[k].outputs)),
        own_error=0 if last else round(ways.share * _bytes(_floating(ways.cut[k].outputs))),
        forward=chain.forward,
        forward_no_grad=chain.forward_no_grad,
        backward=chain.backward(frees=True),
        backward_retained=chain.backward(frees=False),
        backward_activations=chain.backward_activations(frees=True),
        backward_activations_retained=chain.backward_activations(frees=False),
        deferred_errors=chain.deferred_errors,
        weight_layers_graph=chain.weight_layers_graph,
        head=_head_peak(head.memory) if head and head.memory else 0,
        head_weights=head.memory.weights if head and head.memory else 0,
        slots=sum(map(ways.shared, range(max(0, k - 1), min(k + 1, ways.K - 1)))),
        feeds=ways.method.micro_batches if k == 0 else 0,
        up_in=up_in,
        up_out=LinkBytes() if last else ways.up(k),
        down_in=down_in,
        down_out=LinkBytes() if k == 0 else ways.down(k - 1),
    )


def _head_peak(head: LayerMemory) -> int:
    """The most while a head goes forward and backward, the error of the stage's outputs included."""
    chain = StageGraph([head], [0] * len(head.kept), 1.0)
    return max(chain.forward, chain.graph + chain.output + chain.backward(frees=True))


def _floating(outputs: Outputs) -> Outputs:
    return [(shape, dtype) for shape, dtype in outputs if dtype.is_floating_point or dtype.is_complex]


def _bytes(outputs: Outputs) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in outputs)
