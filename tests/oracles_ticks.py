"""The oracles' methods in their papers' own words, tick by tick: graphs in a deque, and queues between stages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oracles import (
    Batch,
    Loss,
    MakeOptimizer,
    MakeSchedule,
    OracleRun,
    cloned,
    detached,
    early_forwards,
    finished,
    own_randomness,
    pull,
    slices_of,
    top_error,
)

# The same methods in other words --------------------------------------------------------------------------------------


@own_randomness()
def mixed_deque(
    stages: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    loss: Loss,
    make_optimizer: MakeOptimizer,
    delays: Sequence[int],
    make_schedule: MakeSchedule | None = None,
    seed: int = 0,
    M: int = 1,
    backward_first: bool = True,
    shrink: float = 1.0,
    reduce: Literal["mean", "sum"] = "mean",
) -> OracleRun:
    """FDG and ADL as their released code computed them on PyTorch <= 1.4: tick by tick, every stage keeps the graphs of the
    batches under way in a deque, and its optimizer writes `p.data` in place under them.

    At tick t stage k forwards batch t and backwards batch t - D_k: lags enter through D alone, so that p = 0 stands for all.
    """
    early_forwards(delays, backward_first)  # only checks
    run, slices = OracleRun(), slices_of(stages, make_optimizer, make_schedule, seed, data=True)
    n, last = len(batches), len(slices) - 1
    graphs: list[deque[tuple[int, int, Any, Any]]] = [deque() for _ in slices]  # (batch, version, input, output)
    errors: list[dict[int, list[Tensor]]] = [{} for _ in slices]  # errors[k][b]: the error of batch b at the output of stage k
    run.age = run.staleness = [[-1] * len(slices) for _ in range(n)]

    def forward(t: int) -> None:
        h, y = batches[t]
        for s, live in zip(slices, graphs, strict=True):
            leaf, out = s.forward(t, h)
            h = detached(out)
            if s.k == last:
                out, errors[last][t] = top_error(run, loss, out, y)
            live.append((t, s.updates, leaf, out))

    def backward(k: int, b: int) -> None:
        if not 0 <= b < n:
            return
        batch, version, leaf, out = graphs[k].popleft()
        assert batch == b
        d = errors[k].pop(b)
        error = pull(out, [x * shrink for x in d] if k < last else d, leaf)
        if k > 0:
            errors[k - 1][b] = error
        run.staleness[b][k] = slices[k].updates - version
        if (b + 1) % M == 0 or b + 1 == n:
            slices[k].update(b % M + 1 if reduce == "mean" else 1)

    for t in range(n + delays[0]):
        for k in reversed(range(last)) if backward_first else ():
            backward(k, t - delays[k])
        if t < n:
            forward(t)
        for k in [last] if backward_first else reversed(range(last + 1)):
            backward(k, t - delays[k])
    return finished(run, slices)


class UnifiedSGD:
    """DSP's optimizers: y' = w - a g; z' = w - s a g; w' = y' + beta (z' - z), z_0 = w_0; s = 0 heavy ball, s = 1 Nesterov.

    At a constant rate its w are those of torch.optim.SGD(nesterov=bool(s)).
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float, s: float, weight_decay: float) -> None:
        self.params, self.lr, self.momentum, self.s, self.weight_decay = params, lr, momentum, s, weight_decay
        self.z = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for i, w in enumerate(self.params):
            if w.grad is None:
                continue
            g = w.grad + self.weight_decay * w
            y = w - self.lr * g
            z = w - self.s * self.lr * g
            w.copy_(y + self.momentum * (z - self.z[i]))
            self.z[i] = z

    def state_dict(self) -> dict[str, Any]:
        return {"z": self.z}


@own_randomness()
def dsp_unified(
    stages: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    loss: Loss,
    p: Sequence[int],
    m: Sequence[int],
    lr: float,
    momentum: float = 0.0,
    s: float = 0.0,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> OracleRun:
    """DSP(p_0..p_{K-1}; m_0..m_{K-1}) as the paper runs it: lock-step ticks and three queues a stage, `UnifiedSGD`.

    g_k = [df_k(h_k; w_k now)/dw_k]^T delta_{k+1} with h_k of m_k ticks ago, q_k = m_k - m_{k+1} - p_k >= 1.
    """
    q = [m[k] - m[k + 1] - p[k] for k in range(len(m) - 1)]
    if p[-1] or m[-1] or min([1, *p[:-1], *q]) < 1:
        raise ValueError(f"no DSP: p = {list(p)}, m = {list(m)}")
    run, slices = OracleRun(), slices_of(stages, lambda w: UnifiedSGD(w, lr, momentum, s, weight_decay), None, seed)
    inputs, outputs, errors = (_queues(lags) for lags in (m, p[:-1], q))
    run.age = [[-1] * len(slices) for _ in batches]
    run.staleness = [[0] * len(slices) for _ in batches]
    for t in range(len(batches) + m[0]):
        fed: Any = (t, *batches[t]) if t < len(batches) else None
        arrived: list[Any] = [fed, *(queue.popleft() for queue in outputs)]  # all stages read before any writes: a barrier
        from_above: list[Any] = [*(queue.popleft() for queue in errors), None]
        for f in slices:
            top = f.k == len(slices) - 1
            sent: Any = None
            stored: Any = None
            if arrived[f.k] is not None:
                b, h, y = arrived[f.k]
                with torch.no_grad():
                    sent = (b, f.call(b, cloned(h)), y)
                stored = (b, h, y, f.updates)
            inputs[f.k].append(stored)
            if not top:
                outputs[f.k].append(sent)

            sent = None
            if (stored := inputs[f.k].popleft()) is not None:
                b, h, y, version = stored
                run.age[b][f.k] = f.updates - version
                with f.statistics_kept():
                    leaf, out = f.forward(b, h)
                    if top:
                        out, error = top_error(run, loss, out, y)
                    else:
                        batch, error = from_above[f.k]
                        assert batch == b
                    sent = (b, pull(out, error, leaf))
                f.update()
            if f.k > 0:
                errors[f.k - 1].append(sent)
    return finished(run, slices)


def _queues(lags: Sequence[int]) -> list[deque[Any]]:
    """Delay lines: what goes in comes out `lag` ticks later; `lag + 1` long while a tick is under way."""
    return [deque([None] * lag, maxlen=lag + 1) for lag in lags]
