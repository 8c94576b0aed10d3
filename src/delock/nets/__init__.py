"""Builds networks by name, and provides what language models need besides: losses, metrics, generation."""

from delock.nets.generate import generate
from delock.nets.gpt import bits, gpt, nats, tokens
from delock.nets.models import MODELS, build

__all__ = ["MODELS", "bits", "build", "generate", "gpt", "nats", "tokens"]
