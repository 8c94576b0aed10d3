"""Memory at fixed addresses: what travels is copied into a slot, and read there until the slot's next batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from delock.errors import UsageError
from delock.links.message import Message
from delock.links.wire import make_dense
from delock.tensors import flatten, unflatten


class StaticMessages:
    """The messages that one stage reads: slot -> a message whose tensors keep their addresses for the whole run."""

    def __init__(self) -> None:
        self.shape: Any = None
        self.leaves: dict[int, list[Tensor]] = {}
        self.samples = 0

    def put(self, slot: int, message: Message) -> None:
        """Copy a message in. Its first use in a slot allocates. Raises UsageError where it is not shaped as the first one."""
        shape, new = flatten((message.values, message.targets))
        if slot not in self.leaves:
            self.shape, self.samples = shape, message.samples
            self.leaves[slot] = [torch.empty_like(leaf) for leaf in make_dense(tuple(t.detach() for t in new))]
        held = self.leaves[slot]
        if shape != self.shape or any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(held, new, strict=True)):
            raise UsageError(
                f"a batch of {message.samples} samples came after batches of {self.samples}, but captured ticks have memory of one shape: "
                "use a batch size that divides the samples, or drop the last batch"
            )
        for leaf, other in zip(held, new, strict=True):
            leaf.copy_(other.detach())

    def get(self, slot: int) -> Message:
        """The message there. Its tensors are aliases that autograd does not know to be written to: the cycle says when they may be."""
        values, targets = unflatten(self.shape, [leaf.data for leaf in self.leaves[slot]])
        return Message(values, targets, samples=self.samples)
