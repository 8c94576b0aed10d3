"""The library's front door: `fit` trains anybody's network on anybody's data with any method, in one process or many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from delock.data.loader import Loader
from delock.data.plain import as_loader
from delock.errors import UsageError
from delock.feed import samples
from delock.keys import key
from delock.launch.processes import run_processes
from delock.launch.rank import Rank, backend_for
from delock.launch.torchrun import run_torchrun, under_torchrun
from delock.methods import Method, make, title
from delock.nets.heads import build_head, choose
from delock.nets.measure import AtomCost, balance, measure
from delock.nets.split import Atom, StageModule, atoms, has_batch_norm, resolve_cuts, stages
from delock.plan import Course, check, unroll
from delock.records import Event, Result, StagePrediction, Started
from delock.stage import Loss, OptimizerFactory, ScheduleFactory
from delock.timeline.costs import Costs
from delock.timeline.predict import predict
from delock.train import Job, Metric, StageResult, run_inline, run_rank

Workers = Literal["processes", "inline"]
SLOW = 20  # an op on a machine that others use too may take so many times what it took when it was measured


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
    metrics: Mapping[str, Metric] | None = None,
    heads: str | Sequence[nn.Module] | None = None,
    seed: int = 0,
    workers: Workers = "processes",
    device: str = "cpu",
    threads: int = 1,
    pin: bool = True,
    port: int = 0,
    patience: float = 120.0,
    log_every: int = 10,
    trace: bool = False,
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
    heads       for methods with local losses: the auxiliary head of every stage but the last, as modules (stage output -> what `loss`
                takes) or by a name of delock.nets.heads; by default chosen from the shape of the stage's output. Given modules are
                trained in place
    seed        of dropout, and of the order and transforms of data that has no seed of its own, such as a DataLoader
    workers     "processes" on this host, one per stage with `threads` threads each, or "inline", all stages in this process with
                `threads` threads in all; under torchrun its ranks are used, and only rank 0 gets the Result, the others None
    device      "cpu", "cuda" (stage k on GPU k; inline: all stages on one), "cuda:1"
    patience    seconds without any progress after which a hung run is ended (more where one op is measured to take long); 0: never
    on_event    called with Started, StepRecord (every `log_every` batches) and EvaluationRecord as they come

    Raises UsageError for bad input, NonFinite (a UsageError) for a loss that is no number, StageFailed when a stage raises, dies or hangs.
    """
    if workers not in ("processes", "inline"):
        raise UsageError(f"workers is {workers!r}, but it must be 'processes' or 'inline'")
    backend_for(device, None, 1)  # refuses a device that is not there
    spec = _Spec(
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
        metrics=metrics or {},
        heads=heads,
        seed=seed,
        device=device,
        threads=threads,
        log_every=log_every,
        trace=trace,
        workers="torchrun" if under_torchrun() else workers,
    )
    tell = on_event or (lambda event: None)
    results: list[StageResult] | None
    if spec.workers == "torchrun":
        started: list[Started] = []

        def hear(rank: int, event: Any) -> None:
            if isinstance(event, Started):
                started.append(event)
            tell(event)

        results = run_torchrun(_torchrun_rank, lambda rank: spec, device=device, threads=threads, on_event=hear)
        if results is None:
            return None
        assert spec.setup is not None
        return _result(spec, spec.setup, started[0], results)
    setup = prepare(spec, cuts)
    started_here = setup.started(spec)
    tell(started_here)
    if spec.workers == "inline":
        results = run_inline(setup.jobs(spec), torch.device(device), tell, threads)
    else:
        results = run_processes(
            run_rank,
            setup.jobs(spec),
            threads=threads,
            pin=pin,
            port=port,
            device=device,
            patience=setup.patience(patience),
            on_event=lambda rank, event: tell(event),  # type: ignore[arg-type]
        )
    return _result(spec, setup, started_here, results)


@dataclass
class _Spec:
    """The arguments of `fit`, as far as they shape the run itself."""

    model: nn.Module | Sequence[nn.Module]
    train: Loader
    test: Loader | None
    loss: Loss
    method: Method
    optimizer: OptimizerFactory
    schedule: ScheduleFactory | None
    stages: int | None
    cuts: Sequence[int | str] | None
    epochs: int | None
    steps: int | None
    eval_every: int | None
    metrics: Mapping[str, Metric]
    heads: str | Sequence[nn.Module] | None
    seed: int
    device: str
    threads: int
    log_every: int
    trace: bool
    workers: str
    setup: Setup | None = None  # under torchrun: what this rank has prepared

    def course(self) -> Course:
        """The length of the run. Raises UsageError unless exactly one of epochs and steps says it."""
        if (self.epochs is None) == (self.steps is None):
            raise UsageError("say how long to train: either epochs or steps")
        batches = self.steps if self.steps is not None else len(self.train) * (self.epochs or 0)
        if batches < 1:
            raise UsageError(f"training must last at least one batch, not {batches}: raise epochs or steps")
        every = self.eval_every if self.eval_every is not None else len(self.train)
        if every < 1:
            raise UsageError(f"eval_every is {every}, but it must be at least 1 batch")
        return Course(batches, every if self.test is not None else 0, len(self.test) if self.test is not None else 0)


@dataclass
class Setup:
    """A run that has been checked: where the network is cut and what each atom costs."""

    course: Course
    parts: list[Atom]
    cuts: tuple[int, ...]
    costs: list[AtomCost]
    rows: int  # samples in the batch that was measured
    modules: list[StageModule] = field(default_factory=list)
    heads: dict[int, nn.Module] = field(default_factory=dict)  # stage -> its auxiliary head

    @property
    def K(self) -> int:
        """Number of stages."""
        return len(self.cuts) + 1

    def patience(self, asked: float) -> float:
        """Seconds to wait for a sign of life: what was asked for, but never less than an op of this network may well take."""
        slowest = max(sum(cost.total_s for cost in self.costs[a:b]) for a, b in self.bounds())
        return max(asked, SLOW * slowest) if asked > 0 else 0.0

    def bounds(self) -> list[tuple[int, int]]:
        """First atom, and the one after the last, of each stage."""
        edges = [0, *self.cuts, len(self.parts)]
        return list(itertools.pairwise(edges))

    def jobs(self, spec: _Spec) -> list[Job]:
        """A Job per stage; only the first gets the data."""
        return [
            Job(
                k=k,
                K=self.K,
                module=module,
                names=module.original,
                method=spec.method,
                course=self.course,
                per_epoch=len(spec.train),
                optimizer=spec.optimizer,
                schedule=spec.schedule,
                loss=spec.loss,
                metrics=spec.metrics,
                seed=spec.seed,
                train=spec.train if k == 0 else None,
                test=spec.test if k == 0 else None,
                head=self.heads.get(k),
                log_every=spec.log_every,
                trace=spec.trace,
            )
            for k, module in enumerate(self.modules)
        ]

    def started(self, spec: _Spec) -> Started:
        """What will run, with what the plan and the measured costs predict."""
        own = [self.costs[a:b] for a, b in self.bounds()]
        share = 1 / spec.method.parts  # costs are of a whole batch, ops of a part
        forward = tuple(share * sum(cost.forward_s for cost in atoms) for atoms in own)
        backward = tuple(share * sum(cost.backward_s for cost in atoms) for atoms in own)
        forecast = predict(spec.method, self.K, Costs(forward, backward))
        period = forecast.period if spec.workers != "inline" else sum(forward + backward) * spec.method.parts
        predictions = tuple(
            StagePrediction(k, b - a, sum(cost.params for cost in own[k]), forward[k], backward[k], f.staleness, f.layer_staleness, f.idle)
            for k, ((a, b), f) in enumerate(zip(self.bounds(), forecast.stages, strict=True))
        )
        return Started(
            method=title(spec.method),
            workers=spec.workers,
            batches=self.course.batches,
            epochs=self.course.batches / len(spec.train),
            cuts=self.cuts,
            stages=predictions,
            samples_per_second=self.rows / period,
            messages=tuple(int(self.costs[cut - 1].out_bytes * share) for cut in self.cuts),
        )


def prepare(spec: _Spec, cuts: Sequence[int | str] | None) -> Setup:
    """Check everything that can be checked before the start, measure the network on a first batch, and cut it. Raises UsageError."""
    course = spec.course()
    parts = atoms(spec.model)
    K = _number_of_stages(spec, cuts, len(parts))
    refuse_unfit(parts, K, cuts, spec.method, spec.train.sizes())
    inputs, targets = next(iter(spec.train.epoch(0)))
    costs = _measure(spec, parts, inputs, targets)
    if cuts is None:
        cuts = balance([cost.total_s for cost in costs], K, [cost.params for cost in costs])
    found = tuple(resolve_cuts(parts, cuts))
    heads = _heads(spec, K, [costs[cut - 1].shape for cut in found], costs[-1].shape)
    return Setup(course, parts, found, costs, samples(inputs), stages(parts, found), heads)


def _heads(spec: _Spec, K: int, shapes: Sequence[tuple[int, ...]], logits: tuple[int, ...]) -> dict[int, nn.Module]:
    """The auxiliary heads of the stages that the method gives one. `shapes`: of the outputs of stages 0 .. K-2, for one sample."""
    wanted = spec.method.headed(K)
    given = spec.heads
    if given is not None and not wanted and K > 1:
        raise UsageError(f"{spec.method.name} has no local losses, so it takes no heads")
    if given is not None and not isinstance(given, str):
        if len(given) != len(wanted):
            raise UsageError(f"{spec.method.name} in {K} stages needs {len(wanted)} auxiliary heads, but {len(given)} were given")
        return dict(zip(wanted, given, strict=True))
    return {k: _head(spec, k, shapes[k], logits) for k in wanted}


def _head(spec: _Spec, k: int, shape: tuple[int, ...], logits: tuple[int, ...]) -> nn.Module:
    if not shape or not logits:
        raise UsageError(f"the output of stage {k} or of the network is a tuple, for which no head is known: give heads=[...] as modules")
    assert spec.heads is None or isinstance(spec.heads, str)
    return build_head(spec.heads or choose(shape), shape, logits[-1], seed=key(spec.seed, "head", k))


def _measure(spec: _Spec, parts: list[Atom], inputs: Any, targets: Any) -> list[AtomCost]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(spec.threads)
        return measure(parts, inputs, targets, spec.loss, device=spec.device)
    finally:
        torch.set_num_threads(before)


def _number_of_stages(spec: _Spec, cuts: Sequence[int | str] | None, layers: int) -> int:
    if cuts is not None:
        if spec.stages not in (None, len(cuts) + 1):
            raise UsageError(f"{len(cuts)} cuts make {len(cuts) + 1} stages, but stages is {spec.stages}: give one of them")
        return len(cuts) + 1
    if spec.stages is not None:
        return spec.stages
    return layers if isinstance(spec.model, list | tuple | nn.ModuleList) else 2


def refuse_unfit(parts: list[Atom], K: int, cuts: Sequence[int | str] | None, method: Method, sizes: list[int] | None) -> None:
    """Raise UsageError where network, cuts, method and the sizes of the batches (where known) do not go together: nothing is computed."""
    if len(parts) < K:
        raise UsageError(f"cannot cut a network of {len(parts)} layers into {K} stages: use at most {len(parts)}")
    if cuts is not None:
        resolve_cuts(parts, cuts)
    check(unroll(method, K, 2 * method.batches_per_update + 2))
    if sizes is not None and has_batch_norm(nn.ModuleList(atom.module for atom in parts)):
        _refuse_single_samples(sizes, method.parts)


def _refuse_single_samples(sizes: list[int], parts: int) -> None:
    """BatchNorm has no variance over one sample; torch would stop in the middle of an epoch."""
    for n in sorted(set(sizes)):
        if 1 in (len(part) for part in torch.empty(n, device="meta").tensor_split(parts)):
            count = f"{n} samples" if n > 1 else "one sample"
            split = f", split into {parts} micro-batches," if parts > 1 else ""
            raise UsageError(
                f"a batch of {count}{split} would put a single sample in front of BatchNorm, which needs at least two: "
                "use another batch size, fewer micro-batches, or a number of samples that leaves no such rest"
            )


def _torchrun_rank(rank: Rank, spec: _Spec) -> StageResult:
    """One rank under torchrun: rank 0 measures and cuts, and tells the others, so that all follow one plan."""
    K = spec.stages or (len(spec.cuts) + 1 if spec.cuts is not None else rank.world)
    if rank.world != K:
        raise UsageError(f"torchrun started {rank.world} ranks for {K} stages: start as many ranks as stages (--nproc-per-node {K})")
    spec.stages = K
    told: list[Any] = [None]
    if rank.rank == 0:
        spec.setup = prepare(spec, spec.cuts)
        rank.emit(spec.setup.started(spec))
        told = [spec.setup.cuts]
    torch.distributed.broadcast_object_list(told, src=0)
    spec.setup = spec.setup or prepare(spec, told[0])
    return run_rank(rank, spec.setup.jobs(spec)[rank.rank])


def _result(spec: _Spec, setup: Setup, started: Started, results: list[StageResult]) -> Result:
    for module, result in zip(setup.modules, results, strict=True):
        module.load_state_dict(result.state)
    for k, head in setup.heads.items():
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
    )
