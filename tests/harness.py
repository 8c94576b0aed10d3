"""Jobs for a tiny workload, and runs of them in one process or in many, for the tests of whole runs."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from delock.checkpoints.encoding import decode, encode
from delock.engine.engine import run_here
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links.mailbox import Mailbox
from delock.links.stream import another
from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, PACI, ZB1P, GPipe, Interlocking, Method, OneFOneB, PipeDream2BW
from delock.options import Placement, Report
from delock.plan import RunLength, windows
from delock.run.inline import run_inline
from delock.run.job import StageJob, StageResult
from delock.run.ranks import run_rank
from delock.run.worker import Worker
from delock.stage import OptimizerFactory

import papers
from oracles_local import tiny_heads
from papers import ORDERS
from workloads import WORK, Samples, sgd, warm_up

CPU = torch.device("cpu")


def plainly(value: object) -> str:
    """Returns the text of a parameter without addresses, which differ between the processes that run the tests."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def enough(cases: Iterable[tuple[Any, ...]], together: int = 2, of: Callable[..., tuple[Any, ...]] = lambda *case: case) -> list[Any]:
    """Cases as parameters of a test, of which the fast suite has enough for any two of their values to meet; the rest are slow.

    Values that stand together in no case need not meet. With together=1 every value is there once, and those of each place take turns.
    `of` gives the values of a case where these are not what it is made of.
    """
    found = list(cases)
    values = [[(place, str(value)) for place, value in enumerate(of(*case))] for case in found]
    groups = [set(itertools.combinations(own, together)) for own in values]
    wanted, used, chosen = set[Any]().union(*groups), Counter[Any](), set[int]()
    while wanted:
        best = max(range(len(found)), key=lambda i: (len(groups[i] & wanted), -sum(used[one] for one in values[i])))
        wanted -= groups[best]
        used.update(values[best])
        chosen.add(best)
    return [pytest.param(*case, marks=[] if i in chosen else [pytest.mark.slow]) for i, case in enumerate(found)]


def options_of(method: Method) -> tuple[Any, ...]:
    """The name of a method, and what it is asked to do otherwise; None where it has no such option."""
    names = ("name", "at", "order", "ahead", "accumulate", "reduce", "beta", "behind", "n_wise", "combine", "send")
    return tuple(getattr(method, name, None) for name in names)


def one_of_each(methods: Iterable[Method]) -> list[Any]:
    """Methods as parameters of a test; the fast suite has of each the last one that is listed, which has the most options."""
    found = list(methods)
    kept = {method.name: i for i, method in enumerate(found)}.values()
    return [pytest.param(method, marks=[] if i in kept else [pytest.mark.slow]) for i, method in enumerate(found)]


def every_method(K: int) -> list[Method]:
    """Each method with each of its derivatives, orders, reduces and lags; of interlocking backpropagation a choice."""
    return [
        BP(),
        BP(accumulate=3),
        GPipe(micro_batches=3),
        OneFOneB(micro_batches=3),
        DDG(),
        FR(),
        *(FDG(beta=0.5, at=at, order=order) for at in ("stash", "mixed") for order in ORDERS),  # type: ignore[arg-type]
        *(
            ADL(accumulate=2, reduce=reduce, at=at, order=order)  # type: ignore[arg-type]
            for reduce in ("mean", "sum")
            for at in ("stash", "mixed")
            for order in ORDERS
        ),
        DSP(),
        papers.uneven_dsp(K),
        ZB1P(micro_batches=3),
        *(BP(accumulate=2, behind=2), BP(behind=1, ahead="part")),
        *(DDG(micro_batches=3), DDG(micro_batches=2, ahead="part"), FR(micro_batches=2, ahead="mean")),
        *(FDG(micro_batches=2, ahead="mean"), FDG(0.5, "mixed", "backward-first", 2, "part"), ADL(2, micro_batches=2, ahead="part")),
        *(DSP(micro_batches=2, ahead="part"), PACI(micro_batches=3), PACI(micro_batches=2, ahead="mean")),
        *(PipeDream2BW(micro_batches=3), PipeDream2BW(micro_batches=3, ahead="part")),
        *(DDG(accumulate=2), FR(2, accumulate=3, reduce="sum"), replace(papers.uneven_dsp(K), accumulate=2, ahead="mean")),
        DGL(),
        *(Interlocking(n_wise=n) for n in sorted({*range(1, min(K, 3) + 1), K})),
        Interlocking(n_wise=min(K, 2), combine="sum", send="late"),
        Interlocking(n_wise=min(K, 3), combine="mean"),
    ]


def trained_plainly(model: nn.Module, batches: Iterable[Any], loss: Any, optimizer: Optimizer | None = None) -> list[float]:
    """Trains a model as a loop in plain PyTorch does, by default with SGD at 0.1, and returns the losses."""
    optimizer, losses = optimizer or torch.optim.SGD(model.parameters(), lr=0.1), list[float]()
    for x, y in batches:
        optimizer.zero_grad()
        found = loss(model(x), y)
        found.backward()
        optimizer.step()
        losses.append(found.item())
    return losses


def jobs(
    work: str,
    K: int,
    method: Method,
    *,
    samples: int = 22,
    batch: int = 8,
    epochs: int = 2,
    dtype: torch.dtype = torch.float32,
    optimizer: OptimizerFactory = sgd,
    schedule: Any = warm_up,
    evaluate: bool = True,
    window: int = 256,
    trace: bool = False,
    link: Literal["auto", "gloo", "shared"] = "gloo",
) -> list[StageJob]:
    """A Job per stage on one of the workloads; `samples` leaves an uneven last batch, the test set has one too."""
    net, kind, loss = WORK[work]
    train, test = Samples(kind, samples, batch, dtype), Samples(kind, 11, 4, dtype, seed=1)
    length = RunLength(len(train) * epochs, len(train) if evaluate else 0, len(test) if evaluate else 0)
    stages = net(K, dtype)
    tiny = tiny_heads(stages, next(iter(train.epoch(0)))[0], dtype) if method.local_losses else []
    heads = {k: tiny[k] for k in method.headed(K)}
    return [
        StageJob(
            k=k,
            K=K,
            module=module,
            names={},
            method=method,
            length=length,
            per_epoch=len(train),
            optimizer=optimizer,  # type: ignore[arg-type]
            schedule=schedule,
            loss=loss,
            metrics={},
            seed=7,
            train=train if k == 0 else None,
            test=test if k == 0 else None,
            head=heads.get(k),
            placement=Placement(link=link),
            report=Report(log_every=1, trace=trace),
            window=window,
        )
        for k, module in enumerate(stages)
    ]


def inline(made: list[StageJob]) -> list[StageResult]:
    """All stages in this process, with one thread."""
    return run_inline(made, CPU, lambda event: None)


def in_processes(made: list[StageJob]) -> list[StageResult]:
    """A process per stage, with one thread each."""
    return run_processes(run_rank, made, threads=1, pin=False, patience=60)


def in_the_same_processes(cases: dict[Any, list[StageJob]]) -> dict[Any, list[StageResult]]:
    """Runs one after the other, those of K stages in the same K processes: to start these takes longer than a tiny run."""
    results: dict[Any, list[StageResult]] = {}
    for K in sorted({len(made) for made in cases.values()}):
        payloads = [{case: made[k] for case, made in cases.items() if len(made) == K} for k in range(K)]
        found = run_processes(run_all, payloads, threads=1, pin=False, patience=60)
        results |= {case: [of_rank[case] for of_rank in found] for case in payloads[0]}
    return results


def run_all(rank: Rank, made: dict[Any, StageJob]) -> dict[Any, StageResult]:
    """The target of such processes."""
    results = {}
    for case, job in made.items():
        try:
            results[case] = run_rank(for_one_link(rank), job)
        except Exception as error:
            error.add_note(f"in the run {case}")
            raise
    return results


def for_one_link(rank: Rank) -> Rank:
    """The rank with sockets of their own for the next link, of several that come one after the other."""
    return replace(rank, peers={peer: another(rank.rank, peer, connection) for peer, connection in sorted(rank.peers.items())})


def assert_equal(a: list[StageResult], b: list[StageResult]) -> None:
    """Weights, buffers, optimizer state, losses and evaluations are the same to the last bit."""
    for one, other in zip(a, b, strict=True):
        same_tree(one.state, other.state)
        same_tree(one.head, other.head)
        same_tree(one.optimizer, other.optimizer)
        assert one.losses == other.losses
        found = [[(e.batches, repr(e.test_loss)) for e in run.evaluations] for run in (one, other)]  # by repr: without a test set it is NaN
        assert found[0] == found[1]
        assert one.report.staleness == other.report.staleness
        assert one.report.layer_staleness == other.report.layer_staleness


def same_state(a: Any, b: Any) -> bool:
    """Two state dicts hold the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_batches(a: Any, b: Any) -> bool:
    """Two lists of (inputs, labels) hold the same bits."""
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))


def same_tree(a: Any, b: Any) -> None:
    """Two trees of dicts, lists and tensors are equal; tensors by torch.equal."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            same_tree(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same_tree(x, y)
    else:
        assert a == b


class Held:
    """A run of all stages in this process, in windows of two ticks, held by its parts."""

    def __init__(self, made: list[StageJob]) -> None:
        box = Mailbox()
        self.workers = [Worker(job, box.end(job.k), CPU, lambda event: None) for job in made]
        self.engines = [worker.engine for worker in self.workers]
        for engine in self.engines:
            engine.stage.resumable = True
        self.plans = list(windows(made[0].method, len(made), made[0].length, 2))

    @property
    def losses(self) -> list[float]:
        return self.workers[-1].tracker.losses


def saved_and_loaded(states: list[Any]) -> list[Any]:
    """As a checkpoint keeps them: plain values as JSON, and tensors."""
    encoded = [encode(state) for state in states]
    texts = [json.dumps(structure, allow_nan=False) for structure, _ in encoded]
    copies = [{name: tensor.clone() for name, tensor in tensors.items()} for _, tensors in encoded]
    return [decode(json.loads(text), tensors) for text, tensors in zip(texts, copies, strict=True)]


def whole_and_resumed(make: Callable[[], list[StageJob]], stop: int) -> tuple[Held, Held, list[float]]:
    """A run without a break, one that goes on in new stages with the saved state of another after `stop` windows; the losses of both."""
    whole, first, second = (Held(make()) for _ in range(3))
    for plan in whole.plans:
        run_here(plan, whole.engines)
    for plan in first.plans[:stop]:
        run_here(plan, first.engines)
    for engine, state in zip(second.engines, saved_and_loaded([engine.state() for engine in first.engines]), strict=True):
        engine.load(state)
    old, new = first.workers[-1].tracker, second.workers[-1].tracker
    new.batch_loss, new.batch_count = old.batch_loss, old.batch_count  # with lags, the parts of a batch lie on both sides of the break
    for plan in second.plans[stop:]:
        run_here(plan, second.engines)
    return whole, second, first.losses + second.losses
