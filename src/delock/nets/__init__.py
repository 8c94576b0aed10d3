"""Builds networks by name, and provides what language models need besides: losses, metrics, generation."""

from delock.nets.generate import generate
from delock.nets.gpt import bits, gpt, nats, tokens
from delock.nets.logits import OfLogits
from delock.nets.models import MODELS, build

__all__ = ["MODELS", "OfLogits", "bits", "build", "generate", "gpt", "nats", "tokens"]
