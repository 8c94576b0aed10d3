"""Independent oracles of short delays: batches in parts, weights ahead, older weights; written from the equations alone.

M parts make a batch, A batches an update, so N = A M parts. Part b = g M + j is part j of batch g, and weighs n_j / n. An empty part
keeps its number, and nothing is computed for it. How "weights ahead" are read here: what is drawn out is the last update before the
version that is used, and a stage's first update never is. So version v is drawn out from v = 2 on, in 2BW from batch 3 on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from oracles import (
    Batch,
    Loss,
    MakeOptimizer,
    MakeSchedule,
    OracleRun,
    Slice,
    detached,
    early_forwards,
    finished,
    own_randomness,
    pull,
    slices_of,
)

Ahead = Literal["part", "mean"] | None


def split(batch: Batch, M: int) -> Iterator[tuple[int, Any, Any, float]]:
    """The number j, the inputs, targets and share n_j / n of every part that has samples."""
    x, y = batch
    n = len(tree_leaves(x)[0])
    for j in range(M):
        inputs, targets = (tree_map(lambda whole: whole.tensor_split(M)[j], tree) for tree in (x, y))  # noqa: B023
        if len(tree_leaves(inputs)[0]):
            yield j, inputs, targets, len(tree_leaves(inputs)[0]) / n


def drawn_out(weights: Sequence[Tensor], before: Sequence[Tensor], s: float) -> list[Tensor]:
    """w + s (w - w'), w' the weights before the last update."""
    return [w + s * (w - old) for w, old in zip(weights, before, strict=True)]


def reach(ahead: Ahead, late: int, N: int, b: int) -> float:
    """The updates s by which part b is drawn out on a stage that is `late` = D_k - e parts late: its own staleness, or the stage's mean."""
    return {None: 0.0, "mean": late / N, "part": max(0, math.ceil((late - b % N) / N))}[ahead]


@own_randomness()
def delayed_in_parts(
    stages: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    loss: Loss,
    make_optimizer: MakeOptimizer,
    delays: Sequence[int],
    make_schedule: MakeSchedule | None = None,
    seed: int = 0,
    M: int = 1,
    A: int = 1,
    at: Literal["stash", "replay", "mixed"] = "stash",
    backward_first: bool = False,
    shrink: float = 1.0,
    reduce: Literal["mean", "sum"] = "mean",
    ahead: Ahead = None,
) -> OracleRun:
    """DDG, FR, FDG, ADL, DSP and PACI, delays[k] = D_k in parts.

    Part b goes up through version v = floor(max(0, b - D_k + e) / N), or ahead of it. The derivative is taken there (stash), at the
    newest version from the stored input (replay), or with these activations and the newest weights in the Jacobians (mixed).
    """
    late = [d - e for d, e in zip(delays, early_forwards(delays, backward_first), strict=True)]
    run, slices = OracleRun(), slices_of(stages, make_optimizer, make_schedule, seed)
    for g, batch in enumerate(batches):
        losses = []
        for j, x, y, share in split(batch, M):
            b = g * M + j
            used = [max(0, b - d) // (A * M) for d in late]
            with contextlib.ExitStack() as replays:
                h, graphs = x, []
                for s, v, d in zip(slices, used, late, strict=True):
                    s.load(s.versions[v] if v < 2 else drawn_out(s.versions[v], s.versions[v - 1], reach(ahead, d, A * M, b)))
                    leaf, out = s.forward(b, h)
                    h = detached(out)
                    if at == "replay":
                        replays.enter_context(s.statistics_kept())
                        s.load(s.versions[s.updates])
                        leaf, out = s.forward(b, leaf)
                    elif at == "mixed":
                        s.overwrite(s.versions[s.updates])
                    graphs.append((leaf, out))
                losses.append(down(graphs, loss, y, share, shrink))
            run.age.append([s.updates - v for s, v in zip(slices, used, strict=True)])
            run.staleness.append([0] * len(slices) if at == "replay" else run.age[-1])
        run.losses.append(torch.stack(losses).sum())
        if (g + 1) % A == 0 or g + 1 == len(batches):
            for s in slices:
                step(s, g % A + 1 if reduce == "mean" else 1)
    return finished(run, slices)


def down(graphs: list[tuple[Any, Any]], loss: Loss, y: Any, share: float, shrink: float = 1.0) -> Tensor:
    """Gradients of share times the loss, into all stages' `.grad`; the error that a stage below the last receives is shrunk."""
    value = loss(graphs[-1][1], y)
    error = pull(value, [torch.full_like(value, share)], graphs[-1][0])
    for leaf, out in reversed(graphs[:-1]):
        error = pull(out, [d * shrink for d in error], leaf)
    return value.detach() * share


def step(s: Slice, divisor: int = 1) -> None:
    """One update of the newest weights; all versions are kept."""
    s.load(s.versions[s.updates])
    s.update(divisor)
    s.versions[s.updates] = s.snapshot()


def at_weights(slices: Sequence[Slice], weights: Sequence[list[Tensor]], g: int, M: int, batch: Batch, loss: Loss) -> Tensor:
    """All parts of batch g, up and down through these weights; the loss of the batch."""
    losses = []
    for s, w in zip(slices, weights, strict=True):
        s.load(w)
    for j, x, y, share in split(batch, M):
        h, graphs = x, []
        for s in slices:
            leaf, out = s.forward(g * M + j, h)
            h = detached(out)
            graphs.append((leaf, out))
        losses.append(down(graphs, loss, y, share))
    return torch.stack(losses).sum()


@own_randomness()
def two_versions(
    stages: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    loss: Loss,
    make_optimizer: MakeOptimizer,
    make_schedule: MakeSchedule | None = None,
    seed: int = 0,
    M: int = 1,
    ahead: Ahead = None,
) -> OracleRun:
    """PipeDream-2BW: w^{g+1} = Opt(w^g, sum_j (n_j / n) grad(w^{max(g-1, 0)})), in two banks of weights, and one more for those ahead."""
    run, slices = OracleRun(), slices_of(stages, make_optimizer, make_schedule, seed)
    newest = [s.snapshot() for s in slices]
    previous = older = newest
    for g, batch in enumerate(batches):
        there = previous
        if ahead and g >= 3:
            there = [[2 * w - old for w, old in zip(a, b, strict=True)] for a, b in zip(previous, older, strict=True)]
        run.losses.append(at_weights(slices, there, g, M, batch, loss))
        for s, w in zip(slices, newest, strict=True):
            s.load(w)
            s.update()
        older, previous, newest = previous, newest, [s.snapshot() for s in slices]
        run.age.extend([[min(g, 1)] * len(slices)] * M)
    return finished(run, slices)


@own_randomness()
def uniformly_behind(
    stages: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    loss: Loss,
    make_optimizer: MakeOptimizer,
    make_schedule: MakeSchedule | None = None,
    seed: int = 0,
    M: int = 1,
    behind: int = 0,
    ahead: Ahead = None,
) -> OracleRun:
    """BP `behind` updates late: gradients at w^{max(0, g - behind)} of all stages, drawn out by as many updates, into w^g."""
    run, slices = OracleRun(), slices_of(stages, make_optimizer, make_schedule, seed)
    for g, batch in enumerate(batches):
        v = max(0, g - behind)
        there = [s.versions[v] for s in slices]
        if ahead and v >= 2:
            there = [drawn_out(w, s.versions[v - 1], behind) for s, w in zip(slices, there, strict=True)]
        run.losses.append(at_weights(slices, there, g, M, batch, loss))
        for s in slices:
            step(s)
        run.age.extend([[g - v] * len(slices)] * M)
    return finished(run, slices)


# Optimizers -----------------------------------------------------------------------------------------------------------


class Loop:
    """An optimizer that is an equation, w <- stepped(w, g), and a rate that torch's schedules can turn."""

    def __init__(self, weights: Sequence[Tensor], lr: float) -> None:
        self.weights = list(weights)
        self.rate = torch.optim.SGD([torch.zeros(1)], lr=lr)  # a schedule writes its rate here
        self.t = 0

    @property
    def lr(self) -> float:
        return float(self.rate.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        self.rate.step()  # moves nothing
        for i, w in enumerate(self.weights):
            if w.grad is not None:
                w.copy_(self.stepped(i, w, w.grad))

    def stepped(self, i: int, w: Tensor, g: Tensor) -> Tensor:
        raise NotImplementedError


class SpikedAdam(Loop):
    """AdamW with spike compensation over the horizon r tau, as its equations stand."""

    def __init__(self, weights: Sequence[Tensor], lr: float, tau: float, betas: tuple[float, float] = (0.95, 0.99), r: float = 2) -> None:
        super().__init__(weights, lr)
        self.horizon, (self.b1, self.b2) = r * tau, betas
        self.m, self.v = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))

    def stepped(self, i: int, w: Tensor, g: Tensor, wd: float = 0.01, eps: float = 1e-8) -> Tensor:
        b1, b2, t = self.b1, self.b2, self.t
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        self.v[i] = b2 * self.v[i] + (1 - b2) * g**2
        kept = b1**self.horizon
        d = kept * self.m[i] / (1 - b1**t) + (1 - kept) * g
        return (1 - self.lr * wd) * w - self.lr * d / ((self.v[i] / (1 - b2**t)).sqrt() + eps)


class FedBackAdam(SpikedAdam):
    """Error feedback around AdamW: w <- w - u_n - c (u_n - u_{n - tau}), plain for the first ceil(tau) updates."""

    def __init__(self, weights: Sequence[Tensor], lr: float, tau: float, c: float = 1.0) -> None:
        super().__init__(weights, lr, tau=0, betas=(0.9, 0.999))
        self.tau, self.c = tau, c
        self.past: list[list[Tensor]] = [[] for _ in self.weights]

    def stepped(self, i: int, w: Tensor, g: Tensor, wd: float = 0.01, eps: float = 1e-8) -> Tensor:
        self.past[i].append(w - super().stepped(i, w, g, wd, eps))
        past, n = self.past[i], len(self.past[i]) - 1
        if n < math.ceil(self.tau):
            return w - past[n]
        low, share = n - math.ceil(self.tau), math.ceil(self.tau) - self.tau
        before = past[low] if share == 0 else (1 - share) * past[low] + share * past[low + 1]
        return w - past[n] - self.c * (past[n] - before)
