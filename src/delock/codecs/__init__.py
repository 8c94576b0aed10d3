"""Codecs shrink what travels between stages, and what a replay buffer keeps. A new codec is one class and one row in the table here.

Nothing here loads torch before a tensor is encoded: the command line reads and checks names of codecs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING

from delock.codecs.base import Codec, Encoder, Payload
from delock.codecs.bf16 import BF16
from delock.codecs.int8 import INT8
from delock.codecs.vq import VQ
from delock.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

CODECS: Mapping[str, type[Codec]] = MappingProxyType({codec.name: codec for codec in (BF16, INT8, VQ)})


def settings(codec: type[Codec]) -> list[str]:
    """Returns the names of a codec's settings."""
    return [field.name for field in fields(codec)]  # type: ignore[arg-type]


def parse(codec: str | Codec | None) -> Codec | None:
    """Returns the codec that is called so, "vq:codes=256:dim=16:every=50"; None for "none". A codec stays as it is.

    Raises UsageError for what does not exist or is out of range.
    """
    if codec is None or isinstance(codec, Codec):
        return codec
    if not isinstance(codec, str):
        raise UsageError(f"a codec is {codec!r}, but it must be one of delock.codecs, such as VQ(codes=64), or its name")
    name, *given = codec.split(":")
    if name != "none" and name not in CODECS:
        raise UsageError(f"no codec is called {name!r}" + _nearest(name, ["none", *CODECS], ": use "))
    if given and (name == "none" or not settings(CODECS[name])):
        having = ", ".join(other for other in CODECS if settings(CODECS[other]))
        raise UsageError(f"the codec {name} has no settings, but it is given {':'.join(given)!r}; only {having} has")
    return None if name == "none" else CODECS[name](**_settings(codec, CODECS[name], given))


def parse_error(codec: str | Codec | None) -> Codec | None:
    """Returns the codec of errors that is meant, as `parse` does. Raises UsageError for one that is for activations alone."""
    found = parse(codec)
    if found is not None and not found.takes_errors:
        names = " or ".join(name for name, other in CODECS.items() if other.takes_errors)
        raise UsageError(f"errors travel as none, {names}: {found.name} learns what activations look like")
    return found


def spelled(codec: Codec | None) -> str:
    """Returns the codec as the user would write it, settings at their defaults left out: `parse` reads it."""
    if codec is None:
        return "none"
    usual = type(codec)()
    changed = [name for name in settings(type(codec)) if getattr(codec, name) != getattr(usual, name)]
    return ":".join([codec.name, *(f"{name}={getattr(codec, name)}" for name in changed)])


def decode(payload: Payload) -> Tensor:
    """Returns the tensor that a payload stands for: without a graph, dense, in its old shape, dtype and, if that was dense, layout."""
    return CODECS[payload["codec"]].decode(payload)


def sizes(payload: Payload) -> tuple[int, int, int]:
    """Returns the bytes of the tensor before, of its payload, and of the codebook sent with it."""
    return CODECS[payload["codec"]].sizes(payload)


def _settings(text: str, codec: type[Codec], listed: list[str]) -> dict[str, int]:
    """Reads "dim=8", "every=5"; `text` is all that was written, for errors."""
    given: dict[str, int] = {}
    for setting in listed:
        name, equals, value = setting.partition("=")
        if name not in settings(codec):
            raise UsageError(f"{text}: {codec.name} has no setting {name!r}" + _nearest(name, settings(codec), ": "))
        if not equals or not value.removeprefix("-").isdecimal():
            raise UsageError(f"{text}: {name} is {value!r}, but it must be a whole number, as in vq:codes=256:dim=16:every=50")
        if name in given:
            raise UsageError(f"{text}: {name} is given twice")
        given[name] = int(value)
    if {"dim", "groups"} <= given.keys():
        raise UsageError(f"{text}: dim and groups say the same thing: give one of them")
    return given


def _nearest(word: str, known: list[str], else_all: str) -> str:
    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else else_all + ", ".join(known)


__all__ = [
    "BF16",
    "CODECS",
    "INT8",
    "VQ",
    "Codec",
    "Encoder",
    "Payload",
    "decode",
    "parse",
    "parse_error",
    "settings",
    "sizes",
    "spelled",
]
