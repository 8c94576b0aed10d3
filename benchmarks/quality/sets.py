"""Lists the sets of runs: what is compared on which task, the most informative rows first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from anchor import Anchor
from rows import Row
from tasks import Images, Text
from todo import Set

# a cut is named by the first layer of the stage behind it
SIX_BLOCKS = ((1, ()), (4, ("block1", "block3", "block5")), (8, ("block0", "block1", "block2", "block3", "block4", "block5", "norm")))
EIGHT_BLOCKS = ((1, ()), (2, ("block4",)), (4, ("block2", "block4", "block6")), (8, tuple(f"block{i}" for i in range(1, 8))))
RESNET20 = ((1, ()), (4, (5, 7, 9)))

SCREEN = Text(1_000, 100, 0.1, 16, 4, SIX_BLOCKS)
QUOTE = Text(1_500, 100, 0.1, 16, 3, EIGHT_BLOCKS, depth=8, context=64)
NANOGPT = Anchor(2_000, 100, 0.1, 12, 4, ((1, ()), (4, ("block1", "block2", "block3"))))
CIFAR = Images(3 * 391, 390, 0.0, 128, 1, RESNET20)
TOY = Text(5, 2, 0.1, 2, 2, ((1, ()), (2, ("block1",))), depth=2, width=8, context=8, windows=8, text=None)

# rates to begin with: where at most one update is crossed, and (LATE) where several are
SHORT = MappingProxyType(
    {
        "adamw": (0.002, 0.004, 0.008, 0.016),
        "scadamw": (0.002, 0.004, 0.008, 0.016),
        "scadamw.9": (0.002, 0.004, 0.008, 0.016),
        "scadamw.98": (0.004, 0.008, 0.016),
        "scadamw.r3": (0.004, 0.008, 0.016),
        "muon": (0.01, 0.02, 0.04, 0.08),
        "soap": (0.001, 0.002, 0.004, 0.008),
    }
)
LATE = MappingProxyType(
    {
        "adamw": (0.0005, 0.001, 0.002, 0.004),
        "scadamw": (0.0005, 0.001, 0.002, 0.004),
        "muon": (0.005, 0.01, 0.02, 0.04),
        "soap": (0.0005, 0.001, 0.002, 0.004),
    }
)
RATES = MappingProxyType({"sgd": (0.05, 0.1, 0.2), "scsgd": (0.1, 0.2, 0.4)})  # on images
MAIN = ("muon", "scadamw", "adamw")
Grids = Mapping[str, tuple[float, ...]]


def rows(grids: Grids, method: str, K: int, optimizers: tuple[str, ...], *, feedback: bool = False, **options: Any) -> list[Row]:
    """Returns a row for each optimizer."""
    return [Row(method, K, name, grids[name], tuple(options.items()), feedback) for name in optimizers]


def screening() -> tuple[Row, ...]:
    """Returns the rows of the screening; those that answer whether parts and an optimizer are enough come first."""
    ddg4, ddg8, fdg4 = ("ddg", 4, 4), ("ddg", 8, 8), ("fdg", 4, 4)
    two, paci = ("2bw", 4, 4), ("paci", 4, 4)

    def parts(of: tuple[str, int, int], optimizers: tuple[str, ...], **given: Any) -> list[Row]:
        method, K, M = of
        return rows(SHORT, method, K, optimizers, micro_batches=M, **given)

    def corrected(of: tuple[str, int, int]) -> list[Row]:
        return [*parts(of, ("muon", "adamw"), ahead="part"), *parts(of, ("adamw",), feedback=True)]

    whole = [row for method in ("ddg", "fdg", "dsp") for row in rows(LATE, method, 4, MAIN)]
    soap = [row for of in (ddg4, ddg8, fdg4, two, paci) for row in parts(of, ("soap",))]
    return (
        *rows(SHORT, "bp", 1, MAIN),
        *(row for of in (ddg4, ddg8, two) for row in parts(of, MAIN)),
        *(row for of in (ddg4, ddg8) for row in corrected(of)),
        *(row for of in (fdg4, paci) for row in parts(of, MAIN)),
        *whole,
        *rows(SHORT, "dgl", 4, MAIN),
        *rows(SHORT, "bp", 1, ("soap",)),
        *soap,
        *(row for of in (two, fdg4, paci) for row in corrected(of)),
        *(row for of in (ddg4, ddg8) for row in parts(of, ("muon",), ahead="mean")),
        *(row for method in ("ddg", "fdg", "dsp") for row in rows(LATE, method, 4, ("soap",))),
        *rows(SHORT, "dgl", 4, ("soap",)),
    )


def quoted() -> tuple[Row, ...]:
    """Returns the rows whose figures are quoted, and those of the slowdown by depth: as many parts as stages."""
    few, late = ({name: rates[:3] for name, rates in grids.items()} for grids in (SHORT, LATE))
    return (
        *rows(few, "bp", 1, MAIN),
        *rows(few, "ddg", 4, MAIN, micro_batches=4),
        *rows(few, "ddg", 8, MAIN, micro_batches=8),
        *rows(few, "ddg", 8, ("muon",), micro_batches=8, ahead="part"),
        *rows(few, "ddg", 4, ("scadamw.98",), micro_batches=4),
        *rows(few, "ddg", 4, ("scadamw.98",), micro_batches=4, ahead="part"),
        *rows(few, "ddg", 8, ("muon",), micro_batches=4, ahead="part"),
        *(row for K in (4, 8) for row in rows(few, "ddg", K, ("scadamw.r3",), micro_batches=K)),
        *rows(few, "fdg", 2, ("muon",), micro_batches=2),
        *rows(few, "bp", 1, ("scadamw.98",)),
        *(row for K, M in ((8, 4), (2, 2)) for row in rows(few, "ddg", K, ("muon",), micro_batches=M)),
        *rows(few, "ddg", 4, ("scadamw.9",), micro_batches=4),
        *(row for name in ("muon", "scadamw") for method in ("2bw", "fdg") for row in rows(few, method, 4, (name,), micro_batches=4)),
        *rows(few, "dgl", 4, ("muon", "adamw")),
        *rows(late, "fdg", 4, ("muon",)),
        *rows(few, "ddg", 4, ("muon", "adamw"), micro_batches=4, ahead="part"),
    )


def longer() -> tuple[Row, ...]:
    """Returns the rows that may train longer than backpropagation, to reach its loss, with the best optimizer of both."""
    few = {name: rates[:3] for name, rates in SHORT.items()}
    hidden = rows(few, "fdg", 2, ("muon",), micro_batches=2)  # for slow links
    return (*rows(few, "ddg", 8, ("muon",), micro_batches=4, ahead="part"), *hidden)


def anchor() -> tuple[Row, ...]:
    """Returns the rows of the anchor."""
    rates = {"nanogpt": (0.0005, 0.001, 0.002), "scnanogpt": (0.001, 0.002, 0.004)}
    late = rows(rates, "ddg", 4, ("nanogpt", "scnanogpt"), micro_batches=4)
    return (*rows(rates, "plain", 1, ("nanogpt",)), *rows(rates, "bp", 1, ("nanogpt",)), *late)


def staleness() -> tuple[Row, ...]:
    """Returns the rows of backpropagation with weights that are n updates old everywhere."""
    found = rows(SHORT, "bp", 1, MAIN)
    for n in (1, 2, 4, 8):
        grids = SHORT if n == 1 else LATE
        found += rows(grids, "bp", 1, MAIN, behind=n) + rows(grids, "bp", 1, ("muon",), behind=n, ahead="mean")
    return tuple(found)


def images() -> tuple[Row, ...]:
    """Returns the rows on images with batch norm, and backpropagation in as many parts."""
    return (
        *rows(RATES, "ddg", 4, ("sgd",), micro_batches=4),
        *rows(RATES, "bp", 1, ("sgd",), accumulate=4),
        *rows(RATES, "ddg", 4, ("scsgd",), micro_batches=4, ahead="part"),
        *rows(RATES, "ddg", 4, ("scsgd",), micro_batches=4),
        *rows(RATES, "bp", 1, ("sgd",)),
        *rows(RATES, "fdg", 4, ("sgd",)),
        *rows({"sgd": RATES["scsgd"]}, "ddg", 4, ("sgd",), micro_batches=4, ahead="part"),
    )


def groupnorm() -> tuple[Row, ...]:
    """Returns the rows on images with group norm, whose statistics no parts change."""
    parts = rows(RATES, "ddg", 4, ("sgd", "scsgd"), micro_batches=4)
    return (*rows(RATES, "bp", 1, ("sgd",)), *parts, *rows(RATES, "fdg", 4, ("sgd",)))


SETS: Mapping[str, Set] = MappingProxyType(
    {
        "screening": Set("Six blocks of width 64, context 32, 1,000 updates of 16 windows.", SCREEN, screening()),
        "quoted": Set("Eight blocks of width 64, context 64, 1,500 updates of 16 windows.", QUOTE, quoted(), seeds=3),
        "anchor": Set("nanoGPT's recipe for CPUs: 2,000 updates of 12 windows.", NANOGPT, anchor(), seeds=3),
        "longer115": Set("The set quoted, 1.15 times as long.", replace(QUOTE, updates=1_725), longer(), seeds=3),
        "longer130": Set("The set quoted, 1.3 times as long.", replace(QUOTE, updates=1_950), longer(), seeds=3),
        "staleness": Set("The screening's task; every weight is `behind` updates old.", SCREEN, staleness()),
        "images": Set("ResNet-20 with batch norm, three epochs of CIFAR-10 as JPEG, batch 128.", CIFAR, images(), seeds=3),
        "groupnorm": Set("The same with group norm in the place of batch norm.", replace(CIFAR, norm="group"), groupnorm()),
        "toy": Set(
            "Five updates of a tiny network: for tests of the runner.",
            TOY,
            (Row("bp", 1, "adamw", (1e-5, 1e-4)), Row("ddg", 2, "scadamw", (0.03, 0.3, 3.0))),
            seeds=2,
        ),
    }
)
