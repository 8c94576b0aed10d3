"""The tensors of a message one by one, as they are or encoded; and codebooks, which cross a wire only now and then."""

from __future__ import annotations

from torch import Tensor

from delock.codecs import Payload, sizes
from delock.links.message import Message, MessageName, items
from delock.records import Traffic


class SentBytes:
    """What one end of a link has sent, by neighbour."""

    def __init__(self) -> None:
        self.sums: dict[int, list[int]] = {}  # neighbour -> the numbers of its Traffic

    @property
    def to(self) -> dict[int, Traffic]:
        """Neighbour -> what went there."""
        return {peer: Traffic(*sums) for peer, sums in self.sums.items()}

    def count(self, to: int, name: MessageName, message: Message, length: int) -> None:
        """One message of `length` bytes in all; norms of gradients count as headers do."""
        raw = encoded = codebooks = 0
        for value in items(message.values) if name[0] in ("h", "e", "d") else ():
            own = _sizes(value)
            raw, encoded, codebooks = raw + own[0], encoded + own[1], codebooks + own[2]
        sums = self.sums.setdefault(to, [0] * 5)
        for i, more in enumerate((1, raw, encoded, codebooks, length - encoded - codebooks)):
            sums[i] += more


def _sizes(value: Tensor | Payload) -> tuple[int, int, int]:
    return (value.nbytes, value.nbytes, 0) if isinstance(value, Tensor) else sizes(value)
