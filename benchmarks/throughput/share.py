"""Holds what every contender of a configuration is made from and reports: the network and its cuts, the clock, the losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn
from works import SGD, Batch, Work

from delock.execution import lay_out_input, lay_out_weights, precision
from delock.launch.rank import Rank
from delock.options import Execution
from delock.run.job import StageJob

WARM = 1  # steps of a contender before its clock starts, every time it has its turn


@dataclass
class Share:
    """Holds the facts that both ranks have about a configuration."""

    work: str
    execution: Execution
    model: nn.Module
    halves: list[nn.Module]  # the two stages
    quarters: list[nn.Module]  # the network in four
    head: nn.Module  # of stage 0, for a loss of its own
    jobs: dict[str, list[StageJob]]  # of the library's methods: one for each stage
    batches: list[Batch]
    cores: set[int]  # that the benchmark may use

    @property
    def layers(self) -> list[int]:
        """Returns the number of layers of each of the two stages."""
        return [len(list(half.children())) for half in self.halves]


@dataclass
class TurnReport:
    """Holds the report of one rank on one turn: seconds per batch (0 if it only waited), and the losses of its batches in order."""

    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    costs: tuple[float, float, float] | None = None  # of the ceiling: seconds of a forward, a backward, an update


@dataclass
class Here:
    """Holds a rank with all that a contender is built from."""

    rank: Rank
    work: Work
    share: Share

    @property
    def number(self) -> int:
        """Returns 0 or 1."""
        return self.rank.rank

    def part(self, module: nn.Module, *, travels: bool = False) -> Part:
        """Returns a copy of a module to train in the configuration's layout and precision; `travels`: its messages go through gloo."""
        return Part(copy.deepcopy(module), self.share.execution, travels)

    def batch(self, i: int) -> Batch:
        """Returns batch number i, in a cycle."""
        return self.share.batches[i % len(self.share.batches)]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the network's loss, in the configuration's precision."""
        with precision(self.share.execution, torch.device("cpu")):
            return self.work.loss(outputs, targets)


class Part(nn.Module):
    """Runs a module in a layout and precision, as its user has to write it; with `travels` its messages suit gloo."""

    def __init__(self, module: nn.Module, execution: Execution, travels: bool) -> None:
        super().__init__()
        self.module, self.execution, self.travels = lay_out_weights(execution, module).train(), execution, travels

    def forward(self, x: Tensor) -> Tensor:
        """Returns the module's output."""
        anew = self.travels and self.execution.layout == "channels-last" and x.requires_grad and x.dim() == 4
        entered = _Entrance.apply(x) if anew else lay_out_input(self.execution, x)
        with precision(self.execution, x.device):
            y: Tensor = self.module(entered)
        return y.contiguous() if self.travels else y


class _Entrance(torch.autograd.Function):
    """Lays out images anew, which arrive in the default layout because gloo refuses others; does the reverse with their gradients."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class Trained:
    """Runs a contender whose step is one batch, forward, backward and update, on this rank."""

    def __init__(self, here: Here, modules: Sequence[nn.Module], step: Callable[[Batch], Tensor | None]) -> None:
        self.here, self.step, self.done = here, step, 0
        self.optimizer = SGD([w for module in modules for w in module.parameters()])

    def turn(self, n: int) -> TurnReport:
        """Runs WARM batches, and then n on the clock."""
        losses = [self._one() for _ in range(WARM)]
        begun = perf_counter()
        losses += [self._one() for _ in range(n)]
        seconds = (perf_counter() - begun) / n
        return TurnReport(seconds, [float(loss) for loss in losses if loss is not None])

    def _one(self) -> Tensor | None:
        loss = self.step(self.here.batch(self.done))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss


def idle(n: int) -> TurnReport:
    """Runs the turn of a rank that has nothing to do."""
    return TurnReport()


Turn = Callable[[int], TurnReport]
