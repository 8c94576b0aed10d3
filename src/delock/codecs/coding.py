"""Encoding and decoding tensors: a payload is a dict of tensors, numbers and strings, as a message can carry and a buffer can keep it."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from delock.codecs.bits import length
from delock.codecs.cast import channel_axis, decode_bf16, decode_int8, dtype_of, encode_bf16, encode_int8
from delock.codecs.names import BF16, INT8, VQ, Codec
from delock.codecs.vq import VQEncoder, decode_vq
from delock.errors import UsageError

Payload: TypeAlias = dict[str, Any]
"""An encoded tensor. That of vq refers to the codebook that it needs: it decodes for as long as it is kept, whatever came after."""


class Encoder(Protocol):
    """The sender's half of a codec, for one stream of tensors."""

    def encode(self, x: Tensor, learn: bool) -> Payload | None:
        """x encoded; None where it has to travel as it is. `learn`: whether the codec may adapt to it."""

    def state(self) -> Any:
        """What the coming payloads depend on."""

    def load(self, state: Any) -> None:
        """Go on from `state()`."""


class Cast:
    """The encoder of a codec that has no memory."""

    def __init__(self, codec: BF16 | INT8) -> None:
        self.encoding = encode_bf16 if isinstance(codec, BF16) else encode_int8

    def encode(self, x: Tensor, learn: bool) -> Payload:
        """See Encoder."""
        return self.encoding(x.detach())

    def state(self) -> None:
        """See Encoder."""

    def load(self, state: None) -> None:
        """See Encoder."""


def encoder(codec: Codec, seed: int) -> Encoder:
    """A new encoder; `seed` is that of what a codec draws."""
    return VQEncoder(codec, seed) if isinstance(codec, VQ) else Cast(codec)


def decode(payload: Payload) -> Tensor:
    """The tensor that a payload stands for: without a graph, dense, in its old shape, dtype and, if that was dense, layout."""
    match payload["codec"]:
        case "bf16":
            return decode_bf16(payload)
        case "int8":
            return decode_int8(payload)
        case _:
            return decode_vq(payload)


def takes(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the codec shrinks such a tensor. Whole numbers, and what is small enough already, travel as they are."""
    if not dtype.is_floating_point or 0 in shape:
        return False
    return dtype.itemsize > 2 if isinstance(codec, BF16) else len(shape) > 1 and dtype.itemsize > 1


def predicted(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[float, float]:
    """Bytes of such a tensor once encoded, and bytes of codebooks, each a mean over batches. Raises UsageError where it does not fit."""
    count = torch.Size(shape).numel()
    if not takes(codec, shape, dtype):
        return count * dtype.itemsize, 0.0
    channels = shape[2 if len(shape) == 3 else 1]
    match codec:
        case BF16():
            return 2 * count, 0.0
        case INT8():
            return count + 4 * channels, 0.0
        case VQ():
            return length(count // codec.length(channels), codec.bits), 4 * codec.codes * channels / codec.every


def sizes(payload: Payload) -> tuple[int, int, int]:
    """Bytes of the tensor before, of its payload, and of the codebook sent with it."""
    if payload["codec"] == "vq":
        raw = torch.Size(payload["shape"]).numel() * dtype_of(payload).itemsize
        return raw, payload["codes"].nbytes, payload["book"].nbytes if payload["fresh"] else 0
    values: Tensor = payload["values"]
    return values.numel() * dtype_of(payload).itemsize, values.nbytes + (payload["scale"].nbytes if "scale" in payload else 0), 0


def check(codec: Codec, outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...], where: str) -> None:
    """Raise UsageError where a codec cannot be put on such outputs, a (shape, dtype) each; `where` names the stage that sends them."""
    if not any(dtype.is_floating_point for _, dtype in outputs):
        kinds = ", ".join(str(dtype).removeprefix("torch.") for _, dtype in outputs)
        raise UsageError(f"{where} sends {kinds}, and a codec is for floating point numbers: use codec none, or cut elsewhere")
    for shape, dtype in outputs:
        try:
            predicted(codec, shape, dtype)
        except UsageError as error:
            raise UsageError(f"{where} sends {tuple(shape)}: {error}") from None


__all__ = ["Encoder", "Payload", "channel_axis", "check", "decode", "encoder", "predicted", "sizes", "takes"]
