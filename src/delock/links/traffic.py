"""The bytes that one end of a link has sent, by neighbour and by what they are."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor

from delock.links.message import Message, MessageKind, MessageName
from delock.tensors import Tree, tree_tensors

NORMS = (MessageKind.GRADIENT_NORMS, MessageKind.TOTAL_NORM)


@dataclass(slots=True)
class ByteCounts:
    """The bytes that went to one neighbour; a run's record of them has the same names."""

    messages: int = 0
    raw: int = 0  # of the tensors in them, before a codec
    encoded: int = 0  # of these as they were sent, without codebooks
    codebooks: int = 0
    rest: int = 0  # headers, labels, norms, and what lies between the tensors


class SentBytes:
    """Counts messages and bytes for each neighbour, in `to`."""

    def __init__(self) -> None:
        self.to: defaultdict[int, ByteCounts] = defaultdict(ByteCounts)

    def count(self, to: int, name: MessageName, message: Message, length: int) -> None:
        """Counts one message of `length` bytes in all, as if there were no codec."""
        values = 0 if name.kind in NORMS else _bytes(message.values)
        counts = self.to[to]
        counts.messages += 1
        counts.raw += values
        counts.encoded += values
        counts.rest += length - values

    def correct(self, to: int, raw: int, encoded: int, codebooks: int) -> None:
        """Corrects `count`, which took a tensor for as large as it travels: it had `raw` bytes, and now `encoded` and `codebooks`."""
        counts = self.to[to]
        counts.raw += raw - encoded - codebooks
        counts.encoded -= codebooks
        counts.codebooks += codebooks


def _bytes(values: Tree) -> int:
    """Returns the bytes of the tensors in a message's values; it is called for every message, so it goes straight to them."""
    if isinstance(values, Tensor):
        return values.nbytes
    return sum([_bytes(value) for value in values]) if isinstance(values, tuple) else sum(t.nbytes for t in tree_tensors(values))
