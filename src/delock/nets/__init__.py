"""Networks by name, and the pieces that language models need beside them."""

from delock.nets.generate import generate
from delock.nets.gpt import bits, gpt, nats
from delock.nets.models import MODELS, build

__all__ = ["MODELS", "bits", "build", "generate", "gpt", "nats"]
