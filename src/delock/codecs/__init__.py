"""Codecs shrink what travels between stages, and what a replay buffer keeps: bf16, int8, and vector quantization. No torch here."""

from delock.codecs.names import BF16, INT8, VQ, Codec, parse, parse_error, spelled

__all__ = ["BF16", "INT8", "VQ", "Codec", "parse", "parse_error", "spelled"]
