"""Draws the figure from results.json: speeds over plain PyTorch with one thread, a panel for every configuration."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from report import CEILING, DDP, LIMITS, LINKS, PLAIN, TWO, Found, best_schedule, ratio, ratios

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLUMNS = 3
OURS = [f"{method}, {link}" for method in LIMITS for link in LINKS]


def figure(results: Mapping[str, Found], stem: Path) -> None:
    """Writes stem.png and stem.svg."""
    columns = min(COLUMNS, len(results))
    rows = -(-len(results) // columns)
    drawn, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    for axis, (title, found) in zip(axes.flat, results.items(), strict=False):
        _panel(axis, title, found)
    drawn.supxlabel("speed over plain PyTorch with one thread: medians and ranges; dashed: the ceiling", fontsize=8)
    drawn.tight_layout()
    for suffix in (".png", ".svg"):
        drawn.savefig(stem.with_suffix(suffix), dpi=120)
    plt.close(drawn)


def _panel(axis: Axes, title: str, found: Found) -> None:
    """Draws a bar for every contender, and of torch's schedules for the best."""
    contenders = (TWO, DDP, "naive model parallelism", best_schedule(found), *OURS)
    spread = {name: known for name in contenders if name and (known := ratios(found, name, PLAIN))}
    middle = [statistics.median(known) for known in spread.values()]
    below = [m - min(known) for m, known in zip(middle, spread.values(), strict=True)]
    above = [max(known) - m for m, known in zip(middle, spread.values(), strict=True)]
    colours = ["tab:blue" if name in OURS else "tab:gray" for name in spread]
    axis.barh(list(spread), middle, xerr=[below, above], color=colours, error_kw={"linewidth": 0.8})
    if top := ratio(found, CEILING, PLAIN):
        axis.axvline(top, color="black", linestyle="--", linewidth=0.8)
    axis.invert_yaxis()
    axis.tick_params(labelsize=6)
    axis.set_title(title, fontsize=8)
