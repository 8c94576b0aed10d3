"""Small runs that go on in other stages, for the tests of that; and the model and the optimizer's state of a checkpoint, by names alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import delock
from delock.checkpoints.directory import read, verified

ADAM = partial(torch.optim.Adam, lr=0.01)
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
CUTS: dict[int, list[int]] = {4: [2, 4, 6], 3: [3, 6], 2: [5], 1: []}
cross_entropy = nn.functional.cross_entropy


class Drift(nn.Module):
    """Adds a running mean of what it has seen, which no state dict holds."""

    def __init__(self, lazy: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8), persistent=False)
        self.register_buffer("first", None)  # if lazy, until there has been a batch
        self.lazy = lazy

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.lazy and self.first is None:
            self.first = x.detach().mean(0)
        if self.training:
            self.seen.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x + self.seen + (0 if self.first is None else self.first)


def data(n: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 5, generator=draw), torch.randint(3, (8,), generator=draw)) for _ in range(n)]


def network(*, lazy: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        middle = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), Drift(lazy), nn.Tanh()]
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), *middle, nn.Linear(8, 3))


def train(folder: Path, K: int, batches: int, model: nn.Sequential | None = None, **more: Any) -> tuple[nn.Sequential, delock.Result]:
    """A run in K stages that goes on from the newest checkpoint there, if there is one."""
    keeps = {"resume": "newest", **more.pop("keeps", {})}
    given = {"optimizer": ADAM, "cuts": CUTS.get(K), "eval_every": 5, "workers": "inline", **more}
    model = model or network()
    test, report = (None, delock.Report(log_every=1)) if not given["eval_every"] else (data(2, 1), delock.Report(log_every=1))
    return model, delock.fit(
        model, data(), test, loss=cross_entropy, batches=batches, report=report, checkpoint=delock.Checkpoint(folder, **keeps), **given
    )


def joined(path: Path, model: nn.Sequential) -> nn.Sequential:
    """The model of a checkpoint, by names alone."""
    weights: dict[str, Tensor] = {}
    for file in path.glob("weights-*.safetensors"):
        weights |= load_file(file)
    if isinstance(model[6], Drift):
        model[6].first = weights["6.first"]
    model.load_state_dict(weights)
    for k in range(verified(path).K):
        for name, value in read(path, "in-flight", k)["stage"]["volatile"]["module"].items():
            model.get_buffer(name).copy_(value)
    return model


def loss_of(model: nn.Sequential) -> float:
    """The test loss, in one process."""
    model.eval()
    with torch.no_grad():
        return sum(float(cross_entropy(model(x), y)) for x, y in data(2, 1)) / 2


def falling(n: int) -> float:
    return 1 / (1 + n)


def kept_by_name(path: Path) -> dict[str, dict[str, Any]]:
    """The optimizers' state in a checkpoint, by names that torch itself has put there."""
    found: dict[str, dict[str, Any]] = {}
    for k in range(verified(path).K):
        state = read(path, "optimizer", k)["learner"]["optimizer"]
        for group in state["param_groups"]:
            found |= {name: state["state"][i] for name, i in zip(group["param_names"], group["params"], strict=True) if i in state["state"]}
    return found
