"""The bytes that one end of a link has sent, by neighbour and by what they are."""

from __future__ import annotations

from collections import Counter, defaultdict

from delock.links.message import Message, MessageKind, MessageName
from delock.tensors import tree_tensors

NORMS = (MessageKind.GRADIENT_NORMS, MessageKind.TOTAL_NORM)


class SentBytes:
    """Counts, for each neighbour: `messages`; `raw`, bytes of the tensors in them before a codec; `encoded`, bytes of these as they were
    sent; `codebooks`; and `rest`, bytes of headers, labels and what lies between the tensors."""

    def __init__(self) -> None:
        self.to: defaultdict[int, Counter[str]] = defaultdict(Counter)  # neighbour -> its counts

    def count(self, to: int, name: MessageName, message: Message, length: int) -> None:
        """Counts one message of `length` bytes in all, as if there were no codec. Norms of gradients count as headers do."""
        values = 0 if name.kind in NORMS else sum([tensor.nbytes for tensor in tree_tensors(message.values)])
        counts = self.to[to]
        counts["messages"] += 1
        counts["raw"] += values
        counts["encoded"] += values
        counts["rest"] += length - values

    def correct(self, to: int, raw: int, encoded: int, codebooks: int) -> None:
        """Corrects `count`, which took a tensor for as large as it travels: it had `raw` bytes, and now `encoded` and `codebooks`."""
        counts = self.to[to]
        counts["raw"] += raw - encoded - codebooks
        counts["encoded"] -= codebooks
        counts["codebooks"] += codebooks
