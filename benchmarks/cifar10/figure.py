"""Draws loss and accuracy against epochs from the run folders of `delock compare`.

python benchmarks/cifar10/figure.py COMPARE_K2 COMPARE_K4 --out benchmarks/cifar10/curves
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 10  # logged steps in the running mean of the loss


def main() -> None:
    """Draws a column per folder: training loss above test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    size = (5.2 * len(options.folders), 6.4)  # inches
    figure, axes = plt.subplots(2, len(options.folders), figsize=size, sharex=True, sharey="row", squeeze=False)
    for column, folder in enumerate(options.folders):
        reported = json.loads((folder / "compare.json").read_text())
        for row in reported["rows"]:
            lines = [json.loads(line) for line in (folder / row["name"].replace(":", "-") / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if line["event"] == "step"]
            tests = [line for line in lines if line["event"] == "evaluation"]
            losses = [line["loss"] for line in steps]
            mean = [sum(losses[max(0, i - WINDOW) : i + 1]) / len(losses[max(0, i - WINDOW) : i + 1]) for i in range(len(losses))]
            (drawn,) = axes[0, column].plot([line["epoch"] for line in steps], mean, label=row["name"], linewidth=1.2)
            accuracy = [100 * line["test_accuracy"] for line in tests]
            axes[1, column].plot([line["epoch"] for line in tests], accuracy, marker="o", color=drawn.get_color(), linewidth=1.2)
        axes[0, column].set_title(f"K = {len(reported['cuts']) + 1}")
        axes[0, column].legend(fontsize=8)
        axes[1, column].set_xlabel("epochs")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("test accuracy (%)")
    figure.tight_layout()
    figure.savefig(options.out.with_suffix(".png"), dpi=120)
    figure.savefig(options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
