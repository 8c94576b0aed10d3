"""Runs the usual alternatives: plain PyTorch, naive model parallelism, torch.distributed.pipelining, data parallelism."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from share import Here, Part, Trained, Turn, TurnReport, idle
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble
from torch.nn.parallel import DistributedDataParallel
from works import Batch

CPU = torch.device("cpu")
SINGLE: dict[str, Any] = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B, "ZB1P": ScheduleInterleavedZeroBubble}
MICRO, FOLDED = (2, 4, 8), (4,)  # micro-batches of a batch; of ZBV, whose pattern takes more than two


def plain(here: Here) -> Turn:
    """Runs a loop written by hand, on rank 0, with one thread."""
    if here.number:
        return idle
    model = here.part(here.share.model)

    def step(batch: Batch) -> Tensor:
        loss = here.loss(model(batch[0]), batch[1])
        loss.backward()
        return loss.detach()

    return Trained(here, [model], step).turn


def plain_on_all(here: Here) -> Turn:
    """Runs the same with a thread on each of the two cores; rank 1 sleeps meanwhile."""
    if here.number:
        return idle
    alone, own = plain(here), os.sched_getaffinity(0)

    def turn(n: int) -> TurnReport:
        os.sched_setaffinity(0, here.share.cores)  # first: the threads that torch starts inherit it
        torch.set_num_threads(2)
        try:
            return alone(n)
        finally:
            torch.set_num_threads(1)
            os.sched_setaffinity(0, own)

    return turn


def naive(here: Here) -> Turn:
    """Runs two stages, of which one works at a time, with blocking messages."""
    part = here.part(here.share.halves[here.number], travels=True)
    passed = output_of(here, [here.share.halves[0]], len(here.batch(0)[0]))

    def lower(batch: Batch) -> None:
        h, error = part(batch[0]), torch.empty_like(passed)
        dist.send(h.detach(), 1)
        dist.recv(error, 1)
        h.backward(error)

    def upper(batch: Batch) -> Tensor:
        h = torch.empty_like(passed)
        dist.recv(h, 0)
        loss = here.loss(part(h.requires_grad_()), batch[1])
        loss.backward()
        assert h.grad is not None
        dist.send(h.grad, 0)
        return loss.detach()

    return Trained(here, [part], upper if here.number else lower).turn


def data_parallel(here: Here) -> Turn:
    """Runs the whole network on both ranks, half a batch each; gradients are averaged as they are computed."""
    model = DistributedDataParallel(here.part(here.share.model), forward_sync_buffers=False, gradient_as_bucket_view=True)

    def step(batch: Batch) -> Tensor:
        x, y = (t.chunk(2)[here.number] for t in batch)
        loss = here.loss(model(x), y)
        loss.backward()
        return loss.detach()

    return Trained(here, [model], step).turn


def pipeline(schedule: str, micro: int, here: Here) -> Turn:
    """Runs a schedule that has one stage on each rank."""
    part = here.part(here.share.halves[here.number], travels=True)
    stage = staged(here, here.share.halves, here.number, part, micro)
    made = SINGLE[schedule]
    given = [stage] if schedule == "ZB1P" else stage
    return _driven(here, [part], made(given, micro, loss_fn=here.loss), first=here.number == 0, last=here.number == 1)


def folded(micro: int, here: Here) -> Turn:
    """Runs ZBV, which has two stages on each rank, the first and the last of the four on rank 0."""
    numbers = [here.number, 3 - here.number]
    parts = [here.part(here.share.quarters[i], travels=True) for i in numbers]
    stages = [staged(here, here.share.quarters, i, part, micro) for i, part in zip(numbers, parts, strict=True)]
    made = ScheduleZBVZeroBubble(stages, micro, loss_fn=here.loss)
    return _driven(here, parts, made, first=here.number == 0, last=here.number == 0)


def staged(here: Here, modules: list[nn.Module], k: int, part: Part, micro: int) -> PipelineStage:
    """Returns stage k of the modules, with its input and output given.

    Otherwise torch finds them by a trial, which changes the statistics of batch norm.
    """
    rows = len(here.batch(0)[0]) // micro
    given = here.batch(0)[0][:rows] if k == 0 else output_of(here, modules[:k], rows).requires_grad_()
    return PipelineStage(part, k, len(modules), CPU, input_args=given, output_args=output_of(here, modules[: k + 1], rows).requires_grad_())


def _driven(here: Here, parts: list[Part], schedule: Any, *, first: bool, last: bool) -> Turn:
    def step(batch: Batch) -> Tensor | None:
        losses: list[Tensor] = []
        given = [batch[0]] if first else []
        known = {"target": batch[1], "losses": losses} if last else {}
        schedule.step(*given, **known, return_outputs=False)
        return torch.stack(losses).mean().detach() if last else None

    return Trained(here, parts, step).turn


def output_of(here: Here, modules: list[nn.Module], rows: int) -> Tensor:
    """Returns a tensor like the output of the modules, one after the other, for this number of samples."""
    h = here.batch(0)[0][:rows]
    with torch.no_grad():
        for module in modules:
            h = here.part(module, travels=True)(h)
    return h


SCHEDULES: dict[str, Callable[[Here], Turn]] = {
    **{f"{name}, {micro} micro-batches": partial(pipeline, name, micro) for name in SINGLE for micro in MICRO},
    **{f"ZBV, {micro} micro-batches": partial(folded, micro) for micro in FOLDED},
}
PEERS: dict[str, Callable[[Here], Turn]] = {
    "plain, 1 thread": plain,
    "plain, 2 threads": plain_on_all,
    "naive model parallelism": naive,
    **SCHEDULES,
    "DDP, half batches": data_parallel,
}
