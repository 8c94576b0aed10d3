"""Trains a regression on one's own data: an MLP in two stages, each in its own process.

    python examples/regression.py
    python examples/regression.py --method adl --workers inline

It shows what `delock.fit` takes: an nn.Sequential, a DataLoader over your own data set, targets of more than one tensor, a loss with a
weight per sample, a metric of your own, and a cut. It also shows the outcome: the history, and the trained weights in the model.

The data are made up: Friedman's function of five of ten numbers, measured with two instruments, of which one is nine times as noisy. The
weight of a measurement in the loss is one over its variance.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import delock
from delock.records import Result

FEATURES = 10
NOISE = (1.0, 9.0)  # standard deviations of the two instruments; the function itself has one of about 5


class Measurements(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Holds samples: inputs (10,), targets {"y": (), "weight": ()}, all float32. The mean weight is 1."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.rand(n, FEATURES, generator=generator)  # (n, 10)
        a, b, c, d, e = self.x[:, :5].unbind(1)
        true = 10 * torch.sin(math.pi * a * b) + 20 * (c - 0.5) ** 2 + 10 * d + 5 * e
        noise = torch.tensor(NOISE)[torch.randint(2, (n,), generator=generator)]  # (n,)
        self.y = true + noise * torch.randn(n, generator=generator)  # (n,)
        self.weight = noise**-2 / (noise**-2).mean()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[i], {"y": self.y[i], "weight": self.weight[i]}


def network(width: int = 64, seed: int = 0) -> nn.Sequential:
    """Returns a network (B, 10) -> (B, 1) that may be cut between any two of its layers."""
    torch.manual_seed(seed)
    sizes = [FEATURES, width, width, width]
    hidden = [layer for a, z in itertools.pairwise(sizes) for layer in (nn.Linear(a, z), nn.ReLU())]
    return nn.Sequential(nn.BatchNorm1d(FEATURES), *hidden, nn.Linear(width, 1))


def weighted_squares(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """Returns the mean over the batch, a scalar."""
    return (targets["weight"] * (outputs.squeeze(1) - targets["y"]) ** 2).mean()


def weighted_distance(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """Returns a metric, which is a mean over the batch, too; batches count by their number of samples."""
    return (targets["weight"] * (outputs.squeeze(1) - targets["y"]).abs()).mean()


def main(words: Sequence[str] | None = None) -> Result:
    """Trains, prints, and returns the result of `fit`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="ddg", choices=delock.METHODS)
    parser.add_argument("--workers", default="processes", choices=("processes", "inline"))
    parser.add_argument("--epochs", type=int, default=20)
    asked = parser.parse_args(words)

    model, method = network(), delock.METHODS[asked.method]()
    train = DataLoader(Measurements(1000, seed=1), batch_size=64, shuffle=True)
    test = DataLoader(Measurements(500, seed=2), batch_size=250)
    updates = asked.epochs * len(train) // method.batches_per_update
    result = delock.fit(
        model,
        train,
        test,
        loss=weighted_squares,
        metrics={"distance": weighted_distance},
        method=method,
        cuts=[3],  # stage 1 begins with layer 3; stages=2 would make the stages even in counted work
        optimizer=partial(torch.optim.SGD, lr=0.005, momentum=0.9),
        schedule=partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.05, total_iters=updates),
        epochs=asked.epochs,
        workers=asked.workers,
    )

    first, last = result.evaluations[0], result.evaluations[-1]
    print(f"{method}, cut before layer {result.started.cuts[0]}, {len(result.losses)} batches")
    for stage in result.stages:
        print(f"stage {stage.stage}: {stage.updates} updates, mean staleness {stage.mean_staleness:.2f}, idle {stage.idle:.0%}")
    print(f"test loss {first.test_loss:.3f} -> {last.test_loss:.3f}, mean distance {last.metrics['distance']:.2f}")

    model.eval()  # the trained weights are in it
    with torch.no_grad():
        again = [float(weighted_squares(model(x), y)) for x, y in test]
    print(f"the same from the model itself: {sum(again) / len(again):.3f}")
    return result


if __name__ == "__main__":
    main()
