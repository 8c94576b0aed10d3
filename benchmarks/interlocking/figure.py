"""Writes the table and the figure of N-wise learning from the run folders of README.md: quality against N, means and spreads over seeds.

    python benchmarks/interlocking/figure.py RUNS --out benchmarks/interlocking

RUNS holds cifar-nN-sS and gpt-nN-sS, made by the commands of README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WORKS = (
    ("cifar", "test_accuracy", 100.0, "ResNet-32: test accuracy (%)"),
    ("gpt", "test_bits_per_character", 1.0, "GPT: bits per character"),
)


def values(runs: Path, work: str, n: int, metric: str, scale: float) -> list[float]:
    """Returns the metric at the end of the run, for every seed."""
    summaries = [json.loads(path.read_text()) for path in sorted(runs.glob(f"{work}-n{n}-s*/summary.json"))]
    return [scale * summary[metric] for summary in summaries]


def cell(found: list[float], digits: int) -> str:
    """Returns the mean and half the range."""
    return f"{statistics.mean(found):.{digits}f} ± {(max(found) - min(found)) / 2:.{digits}f}" if found else "-"


def share(own: dict[int, list[float]], n: int) -> str:
    """Returns the recovered share of the gap between N = 1 and N = 4; there is no gap if their ranges overlap."""
    low, high = sorted((own[1], own[4]), key=statistics.mean)
    if max(low) >= min(high):
        return "no gap"
    means = {m: statistics.mean(own[m]) for m in (1, n, 4)}
    return f"{100 * (means[n] - means[1]) / (means[4] - means[1]):.0f} %"


def main() -> None:
    """Writes a row per N, with the share of the gap between N = 1 and N = 4 that it recovers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = {work: {n: values(options.runs, work, n, metric, scale) for n in range(1, 5)} for work, metric, scale, _ in WORKS}
    lines = ["| N | ResNet-32: test accuracy (%) | of the gap | GPT: bits per character | of the gap |", "|---:|---:|---:|---:|---:|"]
    for n in range(1, 5):
        cells = []
        for work, digits in (("cifar", 1), ("gpt", 3)):
            cells += [cell(found[work][n], digits), share(found[work], n)]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    drawn, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, (work, _, _, label) in zip(axes, WORKS, strict=True):
        for n, own in found[work].items():
            axis.plot([n] * len(own), own, "o", color="tab:blue", alpha=0.5)
        axis.plot(list(found[work]), [statistics.mean(own) for own in found[work].values()], color="tab:blue")
        axis.set_xticks([1, 2, 3, 4], ["1\nlocal", "2", "3", "4\nbackpropagation"])
        axis.set_xlabel("N")
        axis.set_title(label)
    drawn.tight_layout()
    for suffix in (".png", ".svg"):
        drawn.savefig((options.out / "quality").with_suffix(suffix), dpi=120)


if __name__ == "__main__":
    main()
