"""Networks: the models by name, the pieces a network can be cut into, what each piece costs, and where to cut."""

from delock.nets.generate import generate
from delock.nets.gpt import bits, gpt, nats
from delock.nets.measure import AtomCost, balance, measure
from delock.nets.models import MODELS, build
from delock.nets.split import Atom, Group, StageModule, atoms, has_batch_norm, join_state, resolve_cuts, stages

__all__ = [
    "MODELS",
    "Atom",
    "AtomCost",
    "Group",
    "StageModule",
    "atoms",
    "balance",
    "bits",
    "build",
    "generate",
    "gpt",
    "has_batch_norm",
    "join_state",
    "measure",
    "nats",
    "resolve_cuts",
    "stages",
]
