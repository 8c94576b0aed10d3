"""Defines what is compared: a row, which is a method with an optimizer, and a run, which is a row at one rate and seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer

from delock.methods import Method, make
from delock.recipes import SGD, AdamW, error_feedback, muon, scadamw, scsgd, soap

# name in a row: factory, and all that it is given besides the rate
OPTIMIZERS: Mapping[str, tuple[Callable[..., Any], dict[str, Any]]] = MappingProxyType(
    {
        "adamw": (AdamW, {"betas": (0.9, 0.95), "weight_decay": 0.01}),
        "nanogpt": (AdamW, {"betas": (0.9, 0.99), "weight_decay": 0.1}),
        "scnanogpt": (scadamw, {"betas": (0.95, 0.99), "weight_decay": 0.1, "r": 3.0}),
        "scadamw": (scadamw, {"betas": (0.95, 0.99), "weight_decay": 0.01, "r": 2.0}),  # without staleness AdamW with these betas
        "scadamw.r3": (scadamw, {"betas": (0.95, 0.99), "weight_decay": 0.01, "r": 3.0}),
        "scadamw.9": (scadamw, {"betas": (0.9, 0.95), "weight_decay": 0.01, "r": 2.0}),
        "scadamw.98": (scadamw, {"betas": (0.9, 0.98), "weight_decay": 0.01, "r": 2.0}),
        "muon": (muon, {"momentum": 0.95, "weight_decay": 0.0, "adjust_lr_fn": "original", "rest": 0.1, "betas": (0.9, 0.95)}),
        "soap": (soap, {"betas": (0.95, 0.95), "weight_decay": 0.01, "precondition_frequency": 10}),
        "sgd": (SGD, {"momentum": 0.9, "weight_decay": 5e-4}),
        "scsgd": (scsgd, {"momentum": 0.9, "weight_decay": 5e-4, "r": 1.0}),
    }
)
FAMILY = MappingProxyType(
    {"scadamw": "adamw", "scadamw.r3": "adamw", "scadamw.9": "adamw", "scadamw.98": "adamw", "scnanogpt": "nanogpt", "scsgd": "sgd"}
)
"""Corrected optimizers, and the one that backpropagation has beside them."""


@dataclass(frozen=True)
class Row:
    """Holds a method in K stages and an optimizer; `rates` is the grid to begin with, ascending, each a fixed factor above the last."""

    method: str
    K: int
    optimizer: str
    rates: tuple[float, ...]
    options: tuple[tuple[str, Any], ...] = ()
    feedback: bool = False

    @property
    def parts(self) -> int:
        """Returns the number of parts of a batch."""
        given = dict(self.options)
        return int(given.get("micro_batches", given.get("accumulate", 1)))

    @property
    def slug(self) -> str:
        """Returns the row as a part of a file's name."""
        return "-".join([self.method, f"k{self.K}", *(f"{name}{value}" for name, value in self.options), self.corrected])

    @property
    def corrected(self) -> str:
        """Returns the optimizer, and that it has error feedback."""
        return self.optimizer + "+feedback" * self.feedback

    @property
    def label(self) -> str:
        """Returns the method as a table shows it."""
        given = [f"{self.parts} parts"] * (self.parts > 1)
        given += [f"{name} {value}" for name, value in self.options if name not in ("micro_batches", "accumulate")]
        return ", ".join([self.method, *([f"K = {self.K}"] if self.K > 1 else []), *given])

    def make_method(self) -> Method:
        """Returns the method. Raises UsageError if there is none of that name with these options for K stages."""
        method = make("bp" if self.method == "plain" else self.method, **dict(self.options))
        method.fits(self.K)
        return method

    def factory(self, rate: float) -> Callable[..., Optimizer]:
        """Returns the factory of the optimizer at a rate."""
        make_optimizer, given = OPTIMIZERS[self.optimizer]
        made: Callable[..., Optimizer] = make_optimizer(lr=rate, **given)
        return error_feedback(made) if self.feedback else made

    def settings(self) -> dict[str, Any]:
        """Returns all that the row says, without the rate, as plain values."""
        factory, given = OPTIMIZERS[self.optimizer]
        optimizer = {"name": factory.__name__, **given, "feedback": self.feedback}
        return {"method": self.method, "options": dict(self.options), "K": self.K, "optimizer": optimizer}

    def compared_with(self, rows: tuple[Row, ...]) -> list[Row]:
        """Returns backpropagation's rows with the optimizer that this one has or corrects, with as many parts where there are such."""
        found = [row for row in rows if row.method == "bp" and "behind" not in dict(row.options) and row.family == self.family]
        return [row for row in found if row.parts == self.parts] or found

    @property
    def family(self) -> str:
        """Returns the optimizer without its correction for staleness."""
        return FAMILY.get(self.optimizer, self.optimizer)


@dataclass(frozen=True)
class Run:
    """Holds a row at one rate, with one seed of weights and data."""

    row: Row
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Returns the name of the run's file, without the ending."""
        return f"{self.row.slug}-lr{self.rate:g}-seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Returns all that the run says, as plain values."""
        return {**self.row.settings(), "lr": self.rate, "seed": self.seed}
