"""A link with codecs on it: one for activations on their way up, in training and in evaluation, and one for errors on their way down.

    stage k                                                                stage k + 1
    tensor -> encoder -> payload, without the codebook           codebook put back -> decoder -> tensor
              that the receiver has                              (the last that came)
                        |                                              ^
                        +--- another link, whatever it is, with payloads: trees of tensors, numbers and strings ---+

So this is the only link that knows of codecs, and what the other one holds is encoded: a buffer on it or a checkpoint keeps little. A link
that keeps messages for later or leaves some out shows them as they come to a `ReceivedCodebooks`: their codebooks may have moved on, or
be those of others, by the time they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from delock.codecs import Codec, Encoder, Payload, decode, sizes
from delock.errors import DelockError
from delock.keys import key
from delock.links import Link, Resumable, resumable
from delock.links.message import Message, MessageKind, MessageName
from delock.links.recorder import Recorder
from delock.tensors import Tree


class ReceivedCodebooks:
    """The last codebook that came from each neighbour for each tensor of a message. Older ones live in the payloads that need them."""

    def __init__(self) -> None:
        self.books: dict[tuple[int, int], tuple[int, Tensor]] = {}  # (neighbour, place in the message) -> version, codebook

    def with_codebooks(self, source: int, message: Message) -> Message:
        """Returns the message with its codebooks put back. It must see all messages, in the order in which they were sent."""
        return _changed(message, partial(self.complete, source))

    def complete(self, source: int, place: int, payload: Payload) -> Payload:
        """Returns the payload with the codebook that it needs. Raises DelockError where that has not come."""
        if "book" not in payload:
            return payload
        if payload["book"] is not None:
            self.books[source, place] = payload["version"], payload["book"]
            return payload
        version, book = self.books.get((source, place), (0, None))
        if version != payload["version"]:
            raise DelockError(f"a message is encoded with codebook {payload['version']}, and the last that came is {version}")
        return {**payload, "book": book}


class CodedLink(Resumable):
    """Stage k's end of another link. `up`, `down`: the codecs of activations and errors; None sends them as they are.

    Evaluation is encoded with what training has learned, and teaches nothing.
    """

    def __init__(self, link: Link, k: int, up: Codec | None, down: Codec | None, seed: int) -> None:
        self.link, self.k, self.seed = link, k, seed
        self.sent = link.sent
        self.codecs = {MessageKind.ACTIVATION: up, MessageKind.EVALUATION: up, MessageKind.ERROR: down}
        self.encoders: dict[tuple[int, int], Encoder] = {}  # (neighbour, place in the message) ->
        self.codebooks = ReceivedCodebooks()

    def send(self, to: int, name: MessageName, message: Message) -> float:
        """Sends the message encoded. Raises UsageError for a tensor that the codec cannot take."""
        if (codec := self.codecs.get(name.kind)) is None:
            return self.link.send(to, name, message)
        values = _each(message.values, partial(self._encoded, to, codec, name.kind is not MessageKind.EVALUATION))
        waited = self.link.send(to, name, replace(message, values=values))
        for payload in payloads(values):
            self.sent.correct(to, *sizes(payload))
        return waited

    def _encoded(self, to: int, codec: Codec, learn: bool, place: int, x: Tensor) -> Tensor | Payload:
        if not codec.takes(x.shape, x.dtype):
            return x
        payload = self._encoder(to, place, codec).encode(x, learn)
        if payload is None:
            return x
        return payload if payload.get("fresh", True) else {**payload, "book": None}

    def _encoder(self, to: int, place: int, codec: Codec) -> Encoder:
        if (to, place) not in self.encoders:
            self.encoders[to, place] = codec.encoder(key(self.seed, "codec", self.k, to, place))
        return self.encoders[to, place]

    def receive(self, source: int, name: MessageName) -> Message:
        """Returns the next message decoded. What the other link holds stays encoded, so what is read twice is decoded twice."""
        message = self.link.receive(source, name)
        began = perf_counter()
        message = _changed(message, partial(self._decoded, source))
        self.decoding += perf_counter() - began
        return message

    def _decoded(self, source: int, place: int, payload: Payload) -> Tensor:
        return decode(self.codebooks.complete(source, place, payload))

    @property
    def recorder(self) -> Recorder:  # type: ignore[override]
        """Returns that of the other link: what it records is encoded."""
        return resumable(self.link).recorder

    def pull(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """Returns messages under way, encoded; the codebooks that they need are in them or in `state()`."""
        return resumable(self.link).pull(source, count)

    def take(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """Takes messages under way, encoded."""
        return resumable(self.link).take(source, count)

    def push(self, source: int, messages: list[tuple[MessageName, Message]]) -> None:
        """Puts encoded messages back."""
        resumable(self.link).push(source, messages)

    def state(self) -> dict[str, Any]:
        """Returns all that the encoders have learned, and the codebooks that came, by neighbour and place in the message."""
        return {
            "link": self.link.state(),
            "encoders": {where: one.state() for where, one in self.encoders.items()},
            "codebooks": dict(self.codebooks.books),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`: the neighbours', of the same moment, has the codebooks that were sent."""
        self.link.load(state["link"])
        self.codebooks.books = dict(state["codebooks"])
        for (to, place), saved in state["encoders"].items():
            codec = self.codecs[MessageKind.ACTIVATION if to > self.k else MessageKind.ERROR]
            assert codec is not None
            self._encoder(to, place, codec).load(saved)

    def close(self) -> None:
        """Closes the other link."""
        self.link.close()


def payloads(values: Tree) -> list[Payload]:
    """Returns the payloads among the values of a message."""
    return [value for value in (values if isinstance(values, tuple) else (values,)) if isinstance(value, dict)]


def _changed(message: Message, act: Callable[[int, Payload], Any]) -> Message:
    """Returns the message with act(place, payload) in place of every payload."""
    if not payloads(message.values):
        return message
    return replace(message, values=_each(message.values, lambda i, value: act(i, value) if isinstance(value, dict) else value))


def _each(values: Tree, act: Callable[[int, Any], Any]) -> Tree:
    """Returns act(place, value) in place of every value of a message: one alone, or a tuple of them; None stays."""
    if isinstance(values, tuple):
        return tuple(None if value is None else act(i, value) for i, value in enumerate(values))
    return None if values is None else act(0, values)
