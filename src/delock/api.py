"""The library's front door: `fit` trains anybody's network on anybody's data with any method, in one process or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from delock.codecs import Codec, parse, parse_error
from delock.data.iterable import as_loader
from delock.errors import UsageError
from delock.launch.processes import run_processes
from delock.launch.rank import Rank, backend_for
from delock.launch.torchrun import run_torchrun, under_torchrun
from delock.links.connect import LinkKind
from delock.methods import Method, make
from delock.methods.base import at_least
from delock.records import Event, Result, Started, Visit
from delock.run.checks import refuse_uncapturable, refuse_wrong_link, refuse_wrong_workers
from delock.run.inline import run_inline
from delock.run.job import Metric, StageResult
from delock.run.prepare import prepare
from delock.run.prepared import PreparedRun
from delock.run.ranks import run_rank
from delock.run.request import Layout, Request
from delock.stage import Loss, OptimizerFactory, ScheduleFactory
from delock.timeline import Emulation, Slowdown

Workers = Literal["processes", "inline"]


def fit(
    model: nn.Module | Sequence[nn.Module],
    train: Any,
    test: Any = None,
    *,
    loss: Loss,
    method: str | Method = "fdg",
    optimizer: OptimizerFactory,
    schedule: ScheduleFactory | None = None,
    stages: int | None = None,
    cuts: Sequence[int | str] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    eval_every: int | None = None,
    clip: float | None = None,
    metrics: Mapping[str, Metric] | None = None,
    heads: str | Sequence[nn.Module] | None = None,
    codec: str | Codec | None = None,
    error_codec: str | Codec | None = None,
    seed: int = 0,
    workers: Workers = "processes",
    device: str = "cpu",
    threads: int = 1,
    pin: bool = True,
    port: int = 0,
    patience: float = 120.0,
    link: LinkKind = "auto",
    log_every: int = 10,
    amp: bool = False,
    layout: Layout = "default",
    chunks: int = 1,
    compile: bool = False,
    slow: Slowdown | None = None,
    emulate: Emulation | None = None,
    trace: bool = False,
    turns: Sequence[Sequence[Visit]] | None = None,
    captured: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Result | None:
    """Train `model` on several workers, one stage each, and leave the trained weights in it.

    model       an nn.Sequential, one of delock.nets or torchvision's ResNets, or a list of modules; every part takes one argument, a
                tensor or a tuple of tensors of any dtype, and returns the same
    train, test batches (inputs, targets), e.g. a DataLoader: inputs a tensor or a tuple of them, targets tensors in tuples, lists, dicts
    loss        loss(outputs, targets) -> the mean over the batch, a scalar; metrics likewise, by name, as numbers
    method      a method of delock.methods, or its name
    optimizer   called by every stage with its [(name in the unsplit model, parameter), ...], returns a torch.optim.Optimizer, so
                parameter groups may be made by name: functools.partial(torch.optim.SGD, lr=0.1) will do
    schedule    called by every stage with its optimizer, returns a scheduler of torch.optim.lr_scheduler; it is stepped once per update
    stages      K; by default 2, the length of a list of modules, or torchrun's number of ranks; cuts: index or name of the first part of
                each stage but the first; by default such that the dearest stage, measured forward and backward, is as cheap as can be
    epochs, steps   how long, in epochs or in batches of `train` (one of them); eval_every: batches between evaluations (default: an epoch)
    clip        largest norm of a gradient: of the whole network's for synchronous methods, of each stage's for the others
    heads       for methods with local losses: the auxiliary head of every stage but the last, as modules (stage output -> what `loss`
                takes) or by a name of delock.nets.heads; by default chosen from the shape of the stage's output. Given modules are
                trained in place
    codec       of the activations that travel, one of delock.codecs: BF16(), INT8(), VQ(codes=256, dim=16, every=50), or as text "bf16",
                "int8", "vq:codes=256:dim=16:every=50"; error_codec: of the errors, BF16() or INT8()
    seed        of dropout, and of the order and transforms of data that has no seed of its own, such as a DataLoader
    workers     "processes" on this host, one per stage with `threads` threads each, or "inline", all stages in this process with
                `threads` threads in all; under torchrun its ranks are used, and only rank 0 gets the Result, the others None
    device      "cpu", "cuda" (stage k on GPU k; inline: all stages on one), "cuda:1"
    patience    seconds without any progress after which a hung run is ended (more where one op is measured to take long); 0: never
    link        between two processes: "gloo", "shared" (memory that both see; the tensors on the CPU), or "auto": that where both are
                on one host, else gloo; with device "cuda" always NCCL
    amp         compute in bfloat16 by autocast; weights, gradients and optimizer stay as they are
    layout      of images in memory: "default", "channels-last", or "auto", the one that is faster in a trial of all layers
    chunks      slices in which a batch goes through a stage, so that each may stay in the cache; batch norm is then per slice
    compile     every stage by torch.compile, before the first batch; evaluation, and batches smaller than the first, stay uncompiled
    slow        ticks in which a stage is made to take longer (delock.timeline.Slowdown)
    emulate     stages wait instead of computing (delock.timeline.Emulation), with messages as large as the model's; nothing is learned
    turns       what the stages of an earlier free-running run did, from its TurnsRecords, per stage: it is done again (workers="inline")
    captured    with device "cuda" and workers "inline": every tick is a CUDA graph, its stages on streams (engine/graphs).
                Experimental. For one forward and one backward per tick, SGD, no dropout, and batches of one size
    on_event    called with Started, StepRecord (every `log_every` batches) and EvaluationRecord as they come; with a free-running
                method also with TurnsRecord

    Raises UsageError for bad input, NonFinite (a UsageError) for a loss that is no number, StageFailed when a stage raises, dies or hangs.
    """
    if workers not in ("processes", "inline"):
        raise UsageError(f"workers is {workers!r}, but it must be 'processes' or 'inline'")
    at_least("threads", threads, 1)
    at_least("log_every", log_every, 1)
    at_least("chunks", chunks, 1)
    backend_for(device, None, 1)  # refuses a device that is not there
    request = Request(
        model=model,
        train=as_loader(train, seed),
        test=None if test is None else as_loader(test, seed),
        loss=loss,
        method=make(method) if isinstance(method, str) else method,
        optimizer=optimizer,
        schedule=schedule,
        stages=stages,
        cuts=cuts,
        epochs=epochs,
        steps=steps,
        eval_every=eval_every,
        clip=clip,
        metrics=metrics or {},
        heads=heads,
        codec=parse(codec),
        error_codec=parse_error(error_codec),
        seed=seed,
        device=device,
        threads=threads,
        link=link,
        log_every=log_every,
        amp=amp,
        layout=layout,
        chunks=chunks,
        compile=compile,
        slow=slow,
        emulate=emulate,
        trace=trace,
        workers="torchrun" if under_torchrun() else workers,
    )
    refuse_wrong_link(request.method, link, device)
    if captured:
        refuse_uncapturable(request)
    if turns is not None and request.workers != "inline":
        raise UsageError('recorded turns are done again in one process: use workers="inline"')
    tell = on_event or (lambda event: None)
    results: list[StageResult] | None
    if request.workers == "torchrun":
        started: list[Started] = []

        def hear(rank: int, event: Any) -> None:
            if isinstance(event, Started):
                started.append(event)
            tell(event)

        target = partial(_torchrun_rank, patience=patience)
        results = run_torchrun(target, lambda rank: request, device=device, threads=threads, patience=patience, on_event=hear)
        if results is None:
            return None
        assert request.prepared is not None
        return _result(request, request.prepared, started[0], results)
    if turns is None:
        refuse_wrong_workers(request.method, request.workers)
    prepared = prepare(request, cuts)
    if turns is not None and len(turns) != prepared.K:
        raise UsageError(f"turns of {len(turns)} stages cannot be done again by {prepared.K}: cut the network as it was cut then")
    started_here = prepared.started(request)
    tell(started_here)
    if request.workers == "inline":
        results = run_inline(prepared.jobs(request), torch.device(device), tell, threads, turns, captured)
    else:
        results = run_processes(
            run_rank,
            prepared.jobs(request),
            threads=threads,
            pin=pin,
            port=port,
            device=device,
            patience=prepared.patience(patience, request.method),
            on_event=lambda rank, event: tell(event),  # type: ignore[arg-type]
        )
    return _result(request, prepared, started_here, results)


def _torchrun_rank(rank: Rank, request: Request, patience: float) -> StageResult:
    """One rank under torchrun: rank 0 measures and cuts, and tells the others, so that all follow one plan."""
    K = request.stages or (len(request.cuts) + 1 if request.cuts is not None else rank.world)
    if rank.world != K:
        raise UsageError(f"torchrun started {rank.world} ranks for {K} stages: start as many ranks as stages (--nproc-per-node {K})")
    refuse_wrong_workers(request.method, request.workers)
    request.stages = K
    told: list[Any] = [None]
    if rank.rank == 0:
        request.prepared = prepare(request, request.cuts)
        rank.emit(request.prepared.started(request))
        told = [request.prepared.cuts]
    torch.distributed.broadcast_object_list(told, src=0)
    request.prepared = request.prepared or prepare(request, told[0])
    rank.be_patient(request.prepared.patience(patience, request.method))
    return run_rank(rank, request.prepared.jobs(request)[rank.rank])


def _result(request: Request, prepared: PreparedRun, started: Started, results: list[StageResult]) -> Result:
    for module, result in zip(prepared.modules, results, strict=True):
        module.load_state_dict(result.state)
    for k, head in prepared.heads.items():
        head.load_state_dict(results[k].head)
    last = results[-1]
    seconds = max(result.seconds for result in results)  # the lower stages are the last to be done
    return Result(
        started=started,
        losses=last.losses,
        evaluations=last.evaluations,
        stages=[result.report for result in results],
        seconds=seconds,
        samples_per_second=last.samples / seconds if seconds > 0 else 0.0,
        samples=last.samples,
        spans=tuple(tuple(result.spans) for result in results),
    )
