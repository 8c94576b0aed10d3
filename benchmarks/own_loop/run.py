"""Times a session beside `fit` on the same batches: seconds of training per batch, in turns, so that each pair meets the same machine.

    python benchmarks/own_loop/run.py --rounds 9

In memory: a list of batches. Loader: a DataLoader that makes each batch of single samples, read by stage 0 in `fit` and by the loop's own
process in a session.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import delock
from delock.nets.models import build

Batch = tuple[Tensor, Tensor]
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def networks() -> dict[str, tuple[Callable[[], nn.Module], Sequence[int], int]]:
    """Returns networks with the shape of a sample, and batches of a run."""
    return {
        "MLP, 4 x 512": (partial(mlp, 512), (512,), 300),
        "MLP, 4 x 2048": (partial(mlp, 2048), (2048,), 60),
        "ResNet-20": (partial(build, "resnet20", classes=10, in_channels=3, image_size=32), (3, 32, 32), 20),
    }


def mlp(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)), nn.Linear(width, 10))


def data(shape: Sequence[int], batches: int, rows: int = 64) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(batches * rows, *shape, generator=g), torch.randint(10, (batches * rows,), generator=g))


def by_fit(model: nn.Module, batches: Any, **options: Any) -> float:
    """Returns the seconds of training."""
    return delock.fit(model, batches, epochs=1, **options).seconds


def by_session(model: nn.Module, batches: Any, **options: Any) -> float:
    """Returns the same of a session."""
    with delock.session(model, next(iter(batches)), **options) as session:
        for batch in batches:
            session.step(batch)
    assert session.result
    return session.result.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | stages | batches | `fit`, ms per batch | session / `fit`: median (quartiles) |\n|---|---|---|---:|---:|")
    for name, (make, shape, count) in networks().items():
        samples = data(shape, count)
        loader: DataLoader[Any] = DataLoader(samples, batch_size=64)
        for kind, batches in {"in memory": list(loader), "loader": loader}.items():
            workers: Literal["inline", "processes"]
            for workers in ("inline", "processes") if kind == "in memory" else ("processes",):
                options = {"loss": nn.functional.cross_entropy, "optimizer": SGD, "method": "ddg", "stages": 2, "workers": workers}
                times = [(by_fit(make(), batches, **options), by_session(make(), batches, **options)) for _ in range(asked.rounds + 1)][1:]
                low, middle, high = statistics.quantiles([own / fit for fit, own in times])
                per_batch = 1e3 * statistics.median(fit for fit, _ in times) / count
                print(f"| {name} | {workers} | {kind} | {per_batch:.2f} | {middle:.3f} ({low:.3f}, {high:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
