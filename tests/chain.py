"""A few stages by hand, in this process: any modules, batches and optimizers, with a look after every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from delock.data.iterable import as_loader
from delock.engine.engine import Engine
from delock.engine.feed import Feed
from delock.engine.log import StageLog
from delock.links.mailbox import Mailbox
from delock.methods import BP, Method
from delock.plan import Plan, RunLength, Step, walk, windows
from delock.stage import Stage
from delock.timeline.spans import Span

import oracles
from oracles import MakeOptimizer, OracleRun

Batches = Sequence[tuple[Any, Any]]
Schedule = Callable[[torch.optim.Optimizer], Any]


def sgd(params: Any) -> torch.optim.SGD:
    """Momentum and a weight decay strong enough to show where it is missing."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.05)


def layers(*more: nn.Module, first: int = 4) -> list[nn.Module]:
    """Three stages of vectors, and more."""
    return seeded(lambda: [nn.Linear(first, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 4), *more])


def stage(module: nn.Module, k: int = 0, K: int = 1, **options: Any) -> Stage:
    """A stage by itself."""
    return Stage(module, k, K, **({"optimizer": sgd, "loss": mse_loss} | options))


def vectors(n: int, features: int = 4, rows: int = 3, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """n batches of `rows` random vectors, with random vectors as targets."""
    g = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, n, rows, features, generator=g, dtype=torch.float64).to(dtype)
    return list(zip(drawn[0].unbind(), drawn[1].unbind(), strict=True))


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """Returns what `make` builds, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


class Chain:
    """Stages in a row with their engines, and the plan that they follow. The modules are copied."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        method: Method,
        batches: Batches,
        *,
        loss: Callable[[Any, Any], Any] = mse_loss,
        optimizer: MakeOptimizer = sgd,
        schedule: Schedule | None = None,
        test: Batches | None = None,
        every: int = 0,
        seed: int = 7,
    ) -> None:
        self.method, self.K = method, len(modules)
        self.length = RunLength(len(batches), every, len(test or []))
        self.box = Mailbox()
        self.losses: list[float] = []
        self.outputs: list[Any] = []
        self.spans: list[list[Span]] = [[] for _ in modules]
        feed = Feed(as_loader(list(batches)), as_loader(list(test)) if test else None, method.micro_batches, torch.device("cpu"))
        self.stages = [
            Stage(
                copy.deepcopy(module),
                k,
                self.K,
                optimizer=optimizer,
                schedule=schedule,
                loss=loss,
                seed=seed,
                mixed=method.mixed,
            )
            for k, module in enumerate(modules)
        ]
        self.engines = [
            Engine(
                stage,
                self.box.end(k),
                feed=feed if k == 0 else None,
                log=StageLog(spans=self.spans[k]),
                micro_batches=method.micro_batches,
                on_loss=lambda step, loss, stage, message: self.losses.append(loss),
                on_output=lambda step, message: self.outputs.append(message.values),
            )
            for k, stage in enumerate(self.stages)
        ]

    def plan(self) -> Plan:
        """The whole run."""
        return next(windows(self.method, self.K, self.length, size=10**6))

    def steps(self) -> Iterator[tuple[int, Step]]:
        """Execute the run; yields (stage, step) after each."""
        with torch.random.fork_rng(devices=[]):
            for k, step in walk(self.plan()):
                self.engines[k].execute(step)
                yield k, step

    def run(self) -> Chain:
        """Execute the run."""
        for _ in self.steps():
            pass
        return self

    def state(self, k: int) -> dict[str, Tensor]:
        """Weights and buffers of a stage."""
        return self.stages[k].module.state_dict()

    def assert_equals(self, want: OracleRun) -> None:
        """Bit for bit: weights, buffers, losses."""
        assert len(want.states) == self.K
        for k, state in enumerate(want.states):
            assert {name: torch.equal(value, state[name]) for name, value in self.state(k).items()} == dict.fromkeys(state, True)
        assert self.losses == [loss.item() for loss in want.losses]

    def assert_close(self, want: OracleRun) -> None:
        """To 1e-10 of each tensor's largest entry: weights, buffers, losses."""
        assert oracles.gap([dict(self.state(k)) for k in range(self.K)], want.states) <= 1e-10
        assert oracles.gap(torch.tensor(self.losses, dtype=torch.float64), torch.stack(want.losses).double()) <= 1e-10


def plain(
    modules: Sequence[nn.Module], batches: Batches, *, loss: Any = mse_loss, optimizer: MakeOptimizer = sgd, schedule: Any = None
) -> OracleRun:
    """Plain PyTorch on the same work, an optimizer per module."""
    return oracles.backprop(modules, batches, loss=loss, make_optimizer=optimizer, make_schedule=schedule, seed=7)


def by_bp(modules: Sequence[nn.Module], batches: Batches, **options: Any) -> None:
    """BP over these stages is plain PyTorch, bit for bit."""
    Chain(modules, BP(), batches, **options).run().assert_equals(plain(modules, batches, **options))
