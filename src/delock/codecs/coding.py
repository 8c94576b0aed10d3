"""The path at which `decode`, `encoder` and `sizes` were once documented; `delock.codecs` and the codecs themselves have them."""

from __future__ import annotations

from delock.codecs import decode, sizes
from delock.codecs.base import Codec, Encoder

__all__ = ["decode", "encoder", "sizes"]


def encoder(codec: Codec, seed: int) -> Encoder:
    """Returns a new encoder of a codec; `seed` is that of its draws."""
    return codec.encoder(seed)
