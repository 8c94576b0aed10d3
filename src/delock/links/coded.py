"""A link with codecs on it: one for activations on their way up, in training and in evaluation, and one for errors on their way down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from delock.codecs import Codec, Encoder, Payload, decode
from delock.errors import DelockError
from delock.keys import key
from delock.links import Link
from delock.links.message import Message, MessageName, items
from delock.tensors import Tree


class CodedLink:
    """Stage k's end of another link. `up`, `down`: the codecs of activations and errors; None sends them as they are.

    What the other link holds is encoded, so a buffer on it, a replay of it or a checkpoint keeps little; who receives a message makes
    tensors of it by `decoded`, whose time is work, not waiting. Evaluation is encoded with what training has learned, and teaches nothing.
    """

    def __init__(self, link: Link, k: int, up: Codec | None, down: Codec | None, seed: int) -> None:
        self.link, self.k, self.seed = link, k, seed
        self.codecs: dict[str, Codec | None] = {"h": up, "e": up, "d": down}  # kind of message ->
        self.encoders: dict[tuple[int, int], Encoder] = {}  # (neighbour, place in the message) ->

    def send(self, to: int, name: MessageName, message: Message) -> float:
        """See Link. Raises UsageError for a tensor that the codec cannot take."""
        if codec := self.codecs.get(name[0]):
            message = replace(message, values=each(message.values, partial(self._encoded, to, codec, name[0] != "e")))
        return self.link.send(to, name, message)

    def _encoded(self, to: int, codec: Codec, learn: bool, place: int, x: Tensor) -> Any:
        if not codec.takes(x.shape, x.dtype):
            return x
        payload = self._encoder(to, place, codec).encode(x, learn)
        return x if payload is None else payload

    def _encoder(self, to: int, place: int, codec: Codec) -> Encoder:
        if (to, place) not in self.encoders:
            self.encoders[to, place] = codec.encoder(key(self.seed, "codec", self.k, to, place))
        return self.encoders[to, place]

    def receive(self, source: int, name: MessageName) -> Message:
        """See Link; encoded."""
        return self.link.receive(source, name)

    def pull(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """See Link; encoded."""
        return self.link.pull(source, count)

    def push(self, source: int, messages: list[tuple[MessageName, Message]]) -> None:
        """See Link; encoded."""
        self.link.push(source, messages)

    def state(self) -> dict[tuple[int, int], Any]:
        """See Link: what the encoders have learned, by neighbour and place in the message."""
        return {where: one.state() for where, one in self.encoders.items()}

    def load(self, state: dict[tuple[int, int], Any]) -> None:
        """See Link."""
        for (to, place), saved in state.items():
            codec = self.codecs["h" if to > self.k else "d"]
            assert codec is not None
            self._encoder(to, place, codec).load(saved)

    def close(self) -> None:
        """See Link."""
        self.link.close()


def each(values: Tree, act: Callable[[int, Any], Any]) -> Tree:
    """act(place, value) in place of every value of a message: one alone, or a tuple of them; None stays."""
    if values is None:
        return None
    return tuple(act(i, value) for i, value in enumerate(values)) if isinstance(values, tuple) else act(0, values)


def decoded(message: Message) -> Message:
    """The message with tensors in place of its payloads, which are as they were sent, or as a Library completed them."""
    return _changed(message, lambda i, payload: decode(payload))


def without_codebooks(message: Message) -> Message:
    """The message as it crosses a wire: without the codebooks that were sent before."""
    return _changed(message, lambda i, payload: payload if payload.get("fresh", True) else {**payload, "book": None})


class Library:
    """The receiver's codebooks of one link: the last one that came for each tensor of a message. Older ones live in what refers to them."""

    def __init__(self) -> None:
        self.books: dict[int, tuple[int, Tensor]] = {}  # place in the message -> version, codebook

    def with_codebooks(self, message: Message) -> Message:
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


def _changed(message: Message, act: Callable[[int, Payload], Any]) -> Message:
    if not any(isinstance(value, dict) for value in items(message.values)):
        return message
    return replace(message, values=each(message.values, lambda i, value: act(i, value) if isinstance(value, dict) else value))
