"""Independent oracles of local losses in plain PyTorch, greedy learning and interlocking backpropagation; heads for the workloads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from delock.keys import key

from oracles import OracleRun
from workloads import CLASSES

Batch = tuple[Any, Any]


class TinyHead(nn.Module):
    """Stage output -> logits (B, 10): channels of an image (B, C, H, W), or the first tensor of a tuple (B, T, C); dropout, batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.dropout, self.out = nn.BatchNorm1d(channels), nn.Dropout(0.2), nn.Linear(channels, CLASSES)

    def forward(self, h: Any) -> Tensor:
        h = h[0] if isinstance(h, tuple) else h
        pooled = h.mean((2, 3)) if h.dim() == 4 else h.mean(1)  # (B, C)
        logits: Tensor = self.out(self.dropout(self.norm(pooled)))
        return logits


def tiny_heads(stages: Sequence[nn.Module], x: Any, dtype: torch.dtype) -> list[nn.Module]:
    """A head for every stage but the last; weights are a function of the stage alone."""
    heads: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for k, stage in enumerate(stages[:-1]):
            x = copy.deepcopy(stage).eval()(x)
            first = x[0] if isinstance(x, tuple) else x
            torch.default_generator.manual_seed(100 + k)
            heads.append(TinyHead(first.shape[1] if first.dim() == 4 else first.shape[2]).to(dtype))
    return heads


def greedy(
    stages: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    loss: Callable[[Any, Any], Tensor],
    make_optimizer: Callable[[list[Tensor]], Any],
    make_schedule: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> tuple[OracleRun, list[dict[str, Tensor]]]:
    """for every batch, for every stage: h' = f_k(h); one step of (w_k, u_k) on loss(a_k(h'), y); h <- h', as it was before the step.

    Dropout of stage k is seeded with key(seed, k, b), that of its head with key(seed, k, "head", b). Returns also the heads' states.
    """
    bodies = [copy.deepcopy(stage).train() for stage in stages]
    tops = [copy.deepcopy(head).train() for head in heads]
    learners = [[*body.parameters(), *(tops[k].parameters() if k < len(tops) else ())] for k, body in enumerate(bodies)]
    optimizers = [make_optimizer(weights) for weights in learners]
    schedules = [make_schedule(optimizer) if make_schedule else None for optimizer in optimizers]
    run = OracleRun()
    with torch.random.fork_rng(devices=[]):
        for b, (h, y) in enumerate(batches):
            for k, body in enumerate(bodies):
                torch.default_generator.manual_seed(key(seed, k, b))
                out = body(tree_map(lambda t: t.clone(), h))
                h = tree_map(lambda t: t.detach(), out)
                if k < len(tops):
                    torch.default_generator.manual_seed(key(seed, k, "head", b))
                    out = tops[k](out)
                value = loss(out, y)
                optimizers[k].zero_grad()
                value.backward()
                optimizers[k].step()
                if schedule := schedules[k]:
                    schedule.step()
            run.losses.append(value.detach())
    run.states = [body.state_dict() for body in bodies]
    run.optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    return run, [top.state_dict() for top in tops]


def n_wise(
    stages: Sequence[nn.Module],
    heads: Mapping[int, nn.Module],
    batches: Sequence[Batch],
    *,
    N: int,
    combine: Literal["furthest", "sum", "mean"],
    loss: Callable[[Any, Any], Tensor],
    make_optimizer: Callable[[list[Tensor]], Any],
    make_schedule: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> tuple[OracleRun, dict[int, dict[str, Tensor]]]:
    """w_k <- step(w_k, dL_j/dw_k), j = min(k + N - 1, K - 1), or for "sum" and "mean" of L_k .. L_j; u_k <- step(u_k, dL_k/du_k).

    One graph through all stages and heads holds every loss of a batch, so that each gradient is a derivative of the whole chain; all
    are taken before anybody steps. `heads`: by stage, those that the method has. Seeds as in `greedy`; returns also the heads' states.
    """
    K = len(stages)
    assert sorted(heads) == list(range(N - 1 if combine == "furthest" else 0, K - 1)), "other heads than the method has"
    bodies = [copy.deepcopy(stage).train() for stage in stages]
    tops = {k: copy.deepcopy(head).train() for k, head in heads.items()}
    w = [list(body.parameters()) for body in bodies]
    u = [list(tops[k].parameters()) if k in tops else [] for k in range(K)]
    optimizers = [make_optimizer(w[k] + u[k]) for k in range(K)]
    schedules = [make_schedule(optimizer) if make_schedule else None for optimizer in optimizers]
    run = OracleRun()
    with torch.random.fork_rng(devices=[]):
        for b, (h, y) in enumerate(batches):
            L: dict[int, Tensor] = {}
            for k, body in enumerate(bodies):
                torch.default_generator.manual_seed(key(seed, k, b))
                h = body(tree_map(torch.clone, h))
                if k in tops:
                    torch.default_generator.manual_seed(key(seed, k, "head", b))
                    L[k] = loss(tops[k](tree_map(torch.clone, h)), y)
            L[K - 1] = loss(h, y)
            for k in range(K):
                furthest = min(k + N - 1, K - 1)
                trainers = [L[furthest]] if combine == "furthest" else [L[j] for j in range(k, furthest + 1)]
                total = torch.stack(trainers).sum() / (len(trainers) if combine == "mean" else 1)
                _gradient(total, w[k])
                _gradient(L.get(k), u[k])
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                if schedule:
                    schedule.step()
            run.losses.append(L[K - 1].detach())
    run.states = [body.state_dict() for body in bodies]
    run.optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    return run, {k: top.state_dict() for k, top in tops.items()}


def _gradient(of: Tensor | None, weights: list[Tensor]) -> None:
    """Each weight's gradient of that loss alone, the graph kept for the next loss."""
    if of is not None and weights:
        for weight, grad in zip(weights, torch.autograd.grad(of, weights, retain_graph=True, allow_unused=True), strict=True):
            weight.grad = grad
