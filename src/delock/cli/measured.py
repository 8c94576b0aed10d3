"""Lists what staleness has cost in our own runs: one figure for a method, a number of stages and an optimizer, with the record behind it.

The records are in benchmarks/quality/runs, and a test compares every figure with them. A row is added when its best rate lies inside its
grid; a combination without a row has no figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from delock.cli.config.update import UpdateOptions

GPT, RESNET = "bits per character", "points of test error"
UNITS: Mapping[str, str] = MappingProxyType({"screening": GPT, "quoted": GPT, "images": RESNET, "groupnorm": RESNET})
"""Sets of runs in benchmarks/quality, and the unit of their scores."""
WORK: Mapping[str, str] = MappingProxyType(
    {"screening": "a GPT of six blocks", "quoted": "a GPT of eight blocks", "images": "ResNet-20", "groupnorm": "ResNet-20 with group norm"}
)
"""The networks that they train."""
HELD: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {"sgd": {"momentum": 0.9}, "muon": {"momentum": 0.95}, "adamw": {"betas": (0.9, 0.95)}, "adamw with spike": {"betas": (0.95, 0.99)}}
)
"""Options of the records' optimizers besides a rate and a horizon."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Holds by how much a delayed run ends above backpropagation, each at its best rate, as the mean of all seeds there are."""

    method: str  # with its options, as `spelled` writes it
    K: int
    optimizer: str
    lost: float
    of: str  # the set of runs
    record: str  # without the seed
    beside: str  # backpropagation's
    correct: tuple[str, ...] = ()
    horizon: float | None = None  # of spike compensation

    @property
    def unit(self) -> str:
        """Returns the unit of what is lost."""
        return UNITS[self.of]

    @property
    def work(self) -> str:
        """Returns the network."""
        return WORK[self.of]

    @property
    def held(self) -> Mapping[str, object]:
        """Returns the momentum or the betas of the delayed run."""
        compensated = self.optimizer == "adamw" and "spike" in self.correct
        return HELD["adamw with spike" if compensated else self.optimizer]

    @property
    def spelled(self) -> str:
        """Returns the optimizer and its corrections: adamw (betas 0.95 0.99) with spike (horizon 2)."""
        [(name, value)] = self.held.items()
        values = " ".join(f"{one:g}" for one in (value if isinstance(value, tuple) else (value,)))
        horizon = "" if self.horizon is None else f" (horizon {self.horizon:g})"
        return f"{self.optimizer} ({name} {values})" + "".join(f" with {one}{horizon * (one == 'spike')}" for one in self.correct)

    @property
    def path(self) -> str:
        """Returns where the record is, with seed 0."""
        return f"benchmarks/quality/runs/{self.of}/{self.record}-seed0.json"


SPIKE = ("spike",)
FIGURES = (
    Figure("ddg(micro_batches=4)", 4, "muon", 0.018, "quoted", "ddg-k4-micro_batches4-muon-lr0.02", "bp-k1-muon-lr0.02"),
    Figure("ddg(micro_batches=8)", 8, "muon", 0.03, "quoted", "ddg-k8-micro_batches8-muon-lr0.02", "bp-k1-muon-lr0.02"),
    Figure(
        "ddg(micro_batches=8, ahead=part)", 8, "muon", 0.005, "quoted", "ddg-k8-micro_batches8-aheadpart-muon-lr0.02", "bp-k1-muon-lr0.02"
    ),
    Figure("ddg(micro_batches=4)", 4, "sgd", 1.82, "images", "ddg-k4-micro_batches4-sgd-lr0.2", "bp-k1-accumulate4-sgd-lr0.2"),
    Figure(
        "ddg(micro_batches=4, ahead=part)",
        4,
        "sgd",
        0.42,
        "images",
        "ddg-k4-micro_batches4-aheadpart-scsgd-lr0.2",
        "bp-k1-accumulate4-sgd-lr0.2",
        SPIKE,
        1.0,
    ),
    Figure(
        "ddg(micro_batches=4)",
        4,
        "sgd",
        0.61,
        "images",
        "ddg-k4-micro_batches4-scsgd-lr0.2",
        "bp-k1-accumulate4-sgd-lr0.2",
        SPIKE,
        1.0,
    ),
    Figure("ddg(micro_batches=2)", 2, "muon", 0.007, "quoted", "ddg-k2-micro_batches2-muon-lr0.02", "bp-k1-muon-lr0.02"),
    Figure("ddg(micro_batches=4)", 4, "adamw", 0.24, "quoted", "ddg-k4-micro_batches4-adamw-lr0.004", "bp-k1-scadamw.98-lr0.008"),
    Figure(
        "ddg(micro_batches=4)", 4, "adamw", 0.055, "quoted", "ddg-k4-micro_batches4-scadamw-lr0.008", "bp-k1-scadamw.98-lr0.008", SPIKE, 2.0
    ),
    Figure(
        "ddg(micro_batches=4)",
        4,
        "adamw",
        0.027,
        "quoted",
        "ddg-k4-micro_batches4-scadamw.r3-lr0.008",
        "bp-k1-scadamw.98-lr0.008",
        SPIKE,
        3.0,
    ),
    Figure(
        "ddg(micro_batches=8)",
        8,
        "adamw",
        0.054,
        "quoted",
        "ddg-k8-micro_batches8-scadamw.r3-lr0.008",
        "bp-k1-scadamw.98-lr0.008",
        SPIKE,
        3.0,
    ),
    Figure(
        "ddg(micro_batches=4, ahead=part)", 8, "muon", 0.042, "quoted", "ddg-k8-micro_batches4-aheadpart-muon-lr0.02", "bp-k1-muon-lr0.02"
    ),
    Figure("ddg(micro_batches=4)", 8, "muon", 0.081, "quoted", "ddg-k8-micro_batches4-muon-lr0.02", "bp-k1-muon-lr0.02"),
    Figure("ddg(micro_batches=8)", 8, "adamw", 0.273, "quoted", "ddg-k8-micro_batches8-adamw-lr0.004", "bp-k1-scadamw.98-lr0.008"),
    Figure(
        "ddg(micro_batches=8)", 8, "adamw", 0.065, "quoted", "ddg-k8-micro_batches8-scadamw-lr0.008", "bp-k1-scadamw.98-lr0.008", SPIKE, 2.0
    ),
    Figure("fdg(micro_batches=2)", 2, "muon", 0.036, "quoted", "fdg-k2-micro_batches2-muon-lr0.02", "bp-k1-muon-lr0.02"),
    Figure("fdg(micro_batches=4)", 4, "muon", 0.069, "quoted", "fdg-k4-micro_batches4-muon-lr0.02", "bp-k1-muon-lr0.02"),
    Figure("2bw(micro_batches=4)", 4, "muon", 0.068, "quoted", "2bw-k4-micro_batches4-muon-lr0.02", "bp-k1-muon-lr0.02"),
    Figure("fdg", 4, "muon", 0.354, "quoted", "fdg-k4-muon-lr0.01", "bp-k1-muon-lr0.02"),
    Figure(
        "fdg(micro_batches=4)", 4, "adamw", 0.146, "quoted", "fdg-k4-micro_batches4-scadamw-lr0.004", "bp-k1-scadamw.98-lr0.008", SPIKE, 2.0
    ),
    Figure(
        "2bw(micro_batches=4)", 4, "adamw", 0.179, "quoted", "2bw-k4-micro_batches4-scadamw-lr0.008", "bp-k1-scadamw.98-lr0.008", SPIKE, 2.0
    ),
    Figure(
        "ddg(micro_batches=4, ahead=part)", 4, "muon", 0.012, "quoted", "ddg-k4-micro_batches4-aheadpart-muon-lr0.02", "bp-k1-muon-lr0.02"
    ),
    Figure(
        "ddg(micro_batches=4, ahead=part)",
        4,
        "adamw",
        0.176,
        "quoted",
        "ddg-k4-micro_batches4-aheadpart-adamw-lr0.008",
        "bp-k1-scadamw.98-lr0.008",
    ),
    Figure("ddg", 4, "muon", 0.116, "screening", "ddg-k4-muon-lr0.02", "bp-k1-muon-lr0.02"),
    Figure("ddg", 4, "adamw", 0.509, "screening", "ddg-k4-adamw-lr0.0005", "bp-k1-adamw-lr0.008"),
    Figure("ddg", 4, "adamw", 0.314, "screening", "ddg-k4-scadamw-lr0.002", "bp-k1-adamw-lr0.008", SPIKE, 2.0),
)


def figure(method: str, K: int, update: UpdateOptions) -> Figure | None:
    """Returns the figure of exactly this method, number of stages, optimizer and corrections; None if there is none."""
    wanted = method, K, update.optimizer, set(update.correct), update.horizon
    return next((one for one in FIGURES if (one.method, one.K, one.optimizer, set(one.correct), one.horizon) == wanted), None)
