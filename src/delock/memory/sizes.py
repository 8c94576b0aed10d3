"""Counts the bytes of every stage for the prediction of its memory: layers, head, optimizer and links."""

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
Shared = Sequence[tuple[tuple[int, ...], torch.dtype, float]]  # and the share of it that is in a message


class RunLinks:
    """Counts what the links carry: bytes of a message, bytes of its tensors, and the number of messages that an end keeps.

    cut: the layers whose outputs are sent. targets: bytes of a batch's labels. slots: per link the numbers of slots for activations and for
    errors in shared memory, in which messages stay while they are in use; None for other links. ahead: the links post receives ahead, and
    keep messages that they have sent, as gloo does.
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

    def crossing(self, link: int) -> Shared:
        """Returns the tensors of a message with activations. Of a batch in parts a weight that stages share is in every message."""
        cost = self.cut[link]
        return [(*one, 1.0 if i in cost.whole else self.share) for i, one in enumerate(cost.outputs)]

    def up(self, link: int) -> LinkBytes:
        """Returns the bytes of activations with their labels."""
        return LinkBytes(round(self._encoded(self.codec, self.crossing(link)) + self.share * self.targets), self._depth(link))

    def down(self, link: int) -> LinkBytes:
        """Returns the bytes of errors, for the outputs that have one."""
        return LinkBytes(round(self._encoded(self.error_codec, _floating(self.crossing(link)))), self._depth(link))

    def received(self, link: LinkBytes, codec: Codec | None, tensors: Shared) -> int:
        """Returns the bytes of a received message while it is in use; encoded tensors and decoded ones live beside each other."""
        return link.message * (self.slots is None) + (round(_bytes(tensors)) if codec else 0)

    def shared(self, link: int) -> int:
        """Returns the bytes of the slots of a link; both ends have all of them."""
        if not self.slots:
            return 0
        activations, errors = self.slots[link]
        return activations * self.up(link).message + errors * self.down(link).message

    def _depth(self, link: int) -> int:
        """Returns the number of messages that an end keeps; 0 in one process, where the other stage has the message itself."""
        return self.method.capacity(link, self.K) if self.ahead else 0

    def _encoded(self, codec: Codec | None, tensors: Shared) -> float:
        if codec is None:
            return _bytes(tensors)
        return sum(share * sum(codec.predicted(shape, dtype)) for shape, dtype, share in tensors)


def stage_sizes(
    k: int,
    links: RunLinks,
    layers: Sequence[LayerCost],
    head: LayerCost | None,
    optimizer: tuple[int, int] | None,
    batch: Outputs,
    fixed: int = 0,
) -> StageBytes | None:
    """Returns the bytes of stage k, or None if something cannot be counted. `batch`: the inputs of the network; `fixed`: see StageBytes."""
    memories = [layer.memory for layer in layers if layer.memory]
    if len(memories) < len(layers) or (head and not head.memory) or optimizer is None:
        return None
    below, last = links.crossing(k - 1) if k else [(*one, links.share) for one in batch], k == links.K - 1
    graph = StageGraph(memories, [round(_bytes([one]) / links.share) for one in below], links.share)
    up_in, down_in = LinkBytes() if k == 0 else links.up(k - 1), LinkBytes() if last else links.down(k)
    state, step = optimizer
    weights = sum(one.weights for one in memories)
    again = any(layer.recomputes for layer in layers)  # then the backward is not split: gradients wait, and not the errors for them
    return StageBytes(
        weights=weights,
        largest=max(one.largest for one in memories),
        state=state,
        optimizer_step=step,
        input=links.received(up_in, links.codec, below) if k else round(_bytes(below) / links.share) + links.targets,
        graph=graph.graph,
        output=graph.output,
        delta=round(_bytes(_floating(below))) if k else 0,
        error=0 if last else links.received(down_in, links.error_codec, _floating(links.crossing(k))),
        own_error=0 if last else round(_bytes(_floating(links.crossing(k)))),
        forward=graph.forward,
        forward_no_grad=graph.forward_no_grad,
        backward=graph.backward(frees=True),
        backward_retained=graph.backward(frees=False),
        backward_activations=graph.backward_activations(frees=True),
        backward_activations_retained=graph.backward_activations(frees=False),
        deferred_errors=weights if again else graph.deferred_errors,
        weight_layers_graph=0 if again else graph.weight_layers_graph,
        head=_head_peak(head.memory) if head and head.memory else 0,
        head_weights=head.memory.weights if head and head.memory else 0,
        slots=sum(map(links.shared, range(max(0, k - 1), min(k + 1, links.K - 1)))),
        feeds=links.method.micro_batches if k == 0 else 0,
        message=round(_bytes(below) + links.share * links.targets),
        fixed=fixed,
        written=sum(one.written for one in memories),
        up_in=up_in,
        up_out=LinkBytes() if last else links.up(k),
        down_in=down_in,
        down_out=LinkBytes() if k == 0 else links.down(k - 1),
    )


def _head_peak(head: LayerMemory) -> int:
    """Returns the peak bytes of a head's forward and backward, above their begin, with the error of the stage's outputs."""
    graph = StageGraph([head], [0] * len(head.kept), 1.0)
    return max(graph.forward, graph.graph + graph.output + graph.backward(frees=True))


def _floating(tensors: Shared) -> Shared:
    return [one for one in tensors if one[1].is_floating_point or one[1].is_complex]


def _bytes(tensors: Shared) -> float:
    return sum(share * torch.Size(shape).numel() * dtype.itemsize for shape, dtype, share in tensors)
