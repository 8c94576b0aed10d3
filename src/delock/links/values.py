"""The tensors of a message one by one, as they are or encoded; and codebooks, which cross a wire only now and then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from delock.codecs.coding import Payload, decode, sizes
from delock.errors import DelockError
from delock.links.message import Message, Name, Tree
from delock.records import Traffic


def each(values: Tree, act: Callable[[int, Any], Any]) -> Tree:
    """act(place, value) in place of every value of a message: one alone, or a tuple of them; None stays."""
    if values is None:
        return None
    return tuple(act(i, value) for i, value in enumerate(values)) if isinstance(values, tuple) else act(0, values)


def items(values: Tree) -> tuple[Tensor | Payload, ...]:
    """The tensors and payloads in a message's values."""
    return () if values is None else values if isinstance(values, tuple) else (values,)


def decoded(message: Message) -> Message:
    """The message with tensors in place of its payloads, which are as they were sent, or as a Library completed them."""
    return _changed(message, lambda i, payload: decode(payload))


def lean(message: Message) -> Message:
    """The message as it crosses a wire: without the codebooks that were sent before."""
    return _changed(message, lambda i, payload: payload if payload.get("fresh", True) else {**payload, "book": None})


class Library:
    """The receiver's codebooks of one link: the last one that came for each tensor of a message. Older ones live in what refers to them."""

    def __init__(self) -> None:
        self.books: dict[int, tuple[int, Tensor]] = {}  # place in the message -> version, codebook

    def completed(self, message: Message) -> Message:
        """The message with its codebooks put back; every message has to be shown, in the order in which they were sent."""
        return _changed(message, self._complete)

    def _complete(self, i: int, payload: Payload) -> Payload:
        if "book" not in payload:
            return payload
        if payload["book"] is not None:
            self.books[i] = payload["version"], payload["book"]
        version, book = self.books.get(i, (0, None))
        if version != payload["version"]:
            raise DelockError(f"a message is encoded with codebook {payload['version']}, and the last that came is {version}")
        return {**payload, "book": book}


class Sent:
    """What one end of a link has sent, by neighbour."""

    def __init__(self) -> None:
        self.sums: dict[int, list[int]] = {}  # neighbour -> the numbers of its Traffic

    @property
    def to(self) -> dict[int, Traffic]:
        """Neighbour -> what went there."""
        return {peer: Traffic(*sums) for peer, sums in self.sums.items()}

    def count(self, to: int, name: Name, message: Message, length: int) -> None:
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


def _changed(message: Message, act: Callable[[int, Payload], Any]) -> Message:
    if not any(isinstance(value, dict) for value in items(message.values)):
        return message
    return replace(message, values=each(message.values, lambda i, value: act(i, value) if isinstance(value, dict) else value))
