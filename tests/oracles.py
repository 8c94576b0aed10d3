"""Independent oracles: every training method as its equation or the sequential loop, in plain PyTorch over whole networks.

Nothing of the library is used but `delock.keys.key` (dropout seeds), so that what is compared with these was written twice.
The loop is fact 1 of the common ground; oracles_ticks has the same methods in their papers' own words, tick by tick.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from delock.keys import key

Batch = tuple[Any, Any]  # inputs: a tensor or a tuple of tensors; targets: any pytree of tensors


Loss = Callable[[Any, Any], Tensor]


MakeOptimizer = Callable[[list[Tensor]], Any]


MakeSchedule = Callable[[Any], Any]


@dataclass
class OracleRun:
    """The results of a run. `staleness[b][k]`: updates between the weights that the gradient of batch b was taken at, on
    stage k, and those it was applied to (so 0 for replay); `age[b][k]`: the same from the weights of the batch's forward."""

    states: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    optimizer_states: list[dict[str, Any]] = field(default_factory=list)
    staleness: list[list[int]] = field(default_factory=list)
    age: list[list[int]] = field(default_factory=list)


def delays_of(p: Sequence[int], q: Sequence[int]) -> list[int]:
    """D_k = sum over k <= j < K-1 of p_j + q_j. Lags of the K-1 links: FDG, ADL p = q = 1; DDG, FR p = 0, q = 1."""
    return [sum(p[k:]) + sum(q[k:]) for k in range(len(p) + 1)]


def gap(got: Any, want: Any) -> float:
    """Over two pytrees: the largest |got - want| of a tensor relative to the largest entry of `want`'s; inf where no match."""
    a, b = tree_leaves(got), tree_leaves(want)
    return max((_gap(x, y) for x, y in zip(a, b, strict=True)), default=0.0) if len(a) == len(b) else float("inf")


def _gap(x: Any, y: Any) -> float:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return 0.0 if x == y else float("inf")
    if x.shape != y.shape or x.dtype != y.dtype:
        return float("inf")
    if torch.equal(x, y):
        return 0.0
    x, y = x.detach().double(), y.detach().double()
    relative = float((x - y).abs().max() / y.abs().max())
    return relative if relative == relative else float("inf")  # not a number is no agreement


# One stage of the network under test ----------------------------------------------------------------------------------


def _floats(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if x.is_floating_point()]


def detached(tree: Any, leaf: bool = False) -> Any:
    return tree_map(lambda x: x.detach().requires_grad_(leaf and x.is_floating_point()), tree)


def cloned(tree: Any) -> Any:
    return tree_map(torch.clone, tree)


def pull(out: Any, error: Sequence[Tensor], h: Any) -> list[Tensor]:
    """The VJP of what made `out` of `h`: parameters collect theirs in `.grad`; returns one tensor per floating input."""
    pairs = [(o, d) for o, d in zip(_floats(out), error, strict=True) if o.requires_grad]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [d for _, d in pairs])
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in _floats(h)]


class Slice:
    """f_k with its parameters, optimizer and schedule; everything private to the oracle."""

    def __init__(
        self, k: int, module: nn.Module, make: MakeOptimizer, schedule: MakeSchedule | None, seed: int, data: bool = False
    ) -> None:
        self.k, self.seed = k, seed
        self.module = copy.deepcopy(module).train()
        self.weights = [p.data if data else p for p in self.module.parameters()]  # what the optimizer writes to
        self.optimizer = make(self.weights) if self.weights else None
        self.schedule = schedule(self.optimizer) if schedule and self.optimizer else None
        self.updates = 0
        self.versions = {0: self.snapshot()}

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.module.parameters()]

    def load(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for p, w in zip(self.module.parameters(), weights, strict=True):
                p.copy_(w)

    def overwrite(self, weights: list[Tensor]) -> None:
        """`load` behind autograd's back: graphs that are alive go on with the new numbers."""
        for p, w in zip(self.module.parameters(), weights, strict=True):
            p.data.copy_(w)

    def call(self, b: int, h: Any) -> Any:
        """f_k(h) with the dropout mask of batch b."""
        torch.default_generator.manual_seed(key(self.seed, self.k, b))
        if _gpus():
            torch.cuda.manual_seed(key(self.seed, self.k, b))
        return self.module(h)

    def forward(self, b: int, h: Any) -> tuple[Any, Any]:
        """The input as leaves and the output, with the graph between; a clone stands between them for first ops in place."""
        h = detached(h, leaf=self.k > 0)
        return h, self.call(b, cloned(h))

    @contextlib.contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Buffers leave as they came; around the backward too, because batch norm's graph refers to its buffers."""
        before = [x.clone() for x in self.module.buffers()]
        yield
        with torch.no_grad():
            for x, old in zip(self.module.buffers(), before, strict=True):
                x.copy_(old)

    def update(self, divisor: int = 1) -> None:
        """w <- optimizer(w, g / divisor); g <- 0."""
        for w, p in zip(self.weights, self.module.parameters(), strict=True):
            g, p.grad = p.grad, None
            w.grad = None if g is None else g / divisor
        if self.optimizer:
            self.optimizer.step()
        if self.schedule:
            self.schedule.step()
        for w in self.weights:
            w.grad = None
        self.updates += 1


def slices_of(
    stages: Sequence[nn.Module], make: MakeOptimizer, schedule: MakeSchedule | None, seed: int, data: bool = False
) -> list[Slice]:
    return [Slice(k, module, make, schedule, seed, data) for k, module in enumerate(stages)]


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """The caller's generators are where they were, afterwards."""
    with torch.random.fork_rng(devices=_gpus()):
        yield


def _gpus() -> list[int]:
    """Those whose generators somebody can have drawn from."""
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return list(range(torch.cuda.device_count())) if in_use else []


def top_error(run: OracleRun, loss: Loss, out: Any, y: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss, recorded, and the error of the loss in itself."""
    value = loss(out, y)
    run.losses.append(value.detach())
    return value, [torch.ones_like(value)]


def finished(run: OracleRun, slices: list[Slice]) -> OracleRun:
    run.states = [{n: x.detach().clone() for n, x in s.module.state_dict().items()} for s in slices]
    run.optimizer_states = [s.optimizer.state_dict() if s.optimizer else {} for s in slices]
    return run


# Backpropagation ------------------------------------------------------------------------------------------------------


@own_randomness()
def backprop(
    stages: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    loss: Loss,
    make_optimizer: MakeOptimizer,
    make_schedule: MakeSchedule | None = None,
    seed: int = 0,
    accumulate: int = 1,
) -> OracleRun:
    """Plain training; also GPipe and 1F1B with `accumulate` micro-batches.

    w <- optimizer(w, sum_i (n_i / n) dLoss_i/dw) over the parts i of the batch, split by tensor_split, empty ones skipped.
    """
    run, slices = OracleRun(), slices_of(stages, make_optimizer, make_schedule, seed)
    for t, (x, y) in enumerate(batches):
        xs, ys = (_parts(tree, accumulate) for tree in (x, y))
        sizes = [len(tree_leaves(part)[0]) for part in xs]
        total: list[Tensor] = []
        for i in [i for i in range(accumulate) if sizes[i]]:
            h = cloned(xs[i])
            for s in slices:
                h = s.call(t * accumulate + i, h)
            value = loss(h, ys[i]) * (sizes[i] / sum(sizes))
            torch.autograd.backward([value])
            total.append(value.detach())
        for s in slices:
            s.update()
        run.losses.append(torch.stack(total).sum())
        run.staleness.append([0] * len(slices))
        run.age.append([0] * len(slices))
    return finished(run, slices)


def _parts(tree: Any, n: int) -> list[Any]:
    return [tree_map(lambda x, i=i: x.tensor_split(n)[i], tree) for i in range(n)]


# The loop behind DDG, FR, FDG, ADL and DSP ----------------------------------------------------------------------------


@own_randomness()
def delayed(
    stages: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    loss: Loss,
    make_optimizer: MakeOptimizer,
    delays: Sequence[int],
    make_schedule: MakeSchedule | None = None,
    seed: int = 0,
    M: int = 1,
    at: Literal["stash", "replay", "mixed"] = "stash",
    backward_first: bool = False,
    shrink: float = 1.0,
    reduce: Literal["mean", "sum"] = "mean",
) -> OracleRun:
    """The sequential loop with delays[k] = D_k, D_{K-1} = 0; e = 1 for backward-first and k < K-1.

    Batch b goes up through version floor(max(0, b - D_k + e) / M), its gradient is applied to version floor(b / M): stage k's
    n-th group of M batches makes its n-th update. An incomplete last group is applied at the end: mean or sum of its r batches.
    `shrink` multiplies the error that a stage k < K-1 receives.
    """
    early = early_forwards(delays, backward_first)
    run, slices = OracleRun(), slices_of(stages, make_optimizer, make_schedule, seed)
    for b, (x, y) in enumerate(batches):
        used = [max(0, b - d + e) // M for d, e in zip(delays, early, strict=True)]
        with contextlib.ExitStack() as replays:
            h, graphs = x, []
            for s, version in zip(slices, used, strict=True):
                s.load(s.versions[version])
                leaf, out = s.forward(b, h)
                h = detached(out)
                if at == "replay":  # the same input and mask at the current weights
                    replays.enter_context(s.statistics_kept())
                    s.load(s.versions[s.updates])
                    leaf, out = s.forward(b, leaf)
                elif at == "mixed":  # the same graph over other numbers
                    s.overwrite(s.versions[s.updates])
                graphs.append((leaf, out))
            top, error = top_error(run, loss, out, y)
            error = pull(top, error, leaf)
            for leaf, out in reversed(graphs[:-1]):
                error = pull(out, [d * shrink for d in error], leaf)
        run.age.append([s.updates - version for s, version in zip(slices, used, strict=True)])
        run.staleness.append([0] * len(slices) if at == "replay" else run.age[-1])
        if (b + 1) % M == 0 or b + 1 == len(batches):
            for s, version in zip(slices, used, strict=True):
                s.load(s.versions[s.updates])
                s.update(b % M + 1 if reduce == "mean" else 1)
                s.versions[s.updates] = s.snapshot()
                s.versions = {n: w for n, w in s.versions.items() if n >= version}  # used versions never fall
    return finished(run, slices)


def early_forwards(delays: Sequence[int], backward_first: bool) -> list[int]:
    """e_k. An update cannot be in a batch's forward before that batch has been down, so e = 1 wants a delay."""
    if any(b > a for a, b in itertools.pairwise(delays)) or delays[-1] != 0:
        raise ValueError(f"delays fall to 0 at the last stage, got {list(delays)}")
    if backward_first and not all(delays[:-1]):
        raise ValueError(f"backward-first needs delays of 1 or more below the last stage, got {list(delays)}")
    return [int(backward_first)] * (len(delays) - 1) + [0]
