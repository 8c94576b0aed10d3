"""What a run is made of: the checked length, the cuts, what every layer costs, and from these a Job per stage and a prediction."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from delock.codecs import Codec
from delock.codecs.coding import check as check_codec
from delock.codecs.coding import predicted
from delock.computing import Computing
from delock.data.loader import Loader
from delock.errors import UsageError
from delock.feed import samples
from delock.keys import key
from delock.links.meet import LinkKind, refuse_link
from delock.methods import AsyncDGL, Method, title
from delock.nets.emulated import Emulated
from delock.nets.heads import HeadShare, build_head, choose, head_share
from delock.nets.measure import AtomCost, balance, measure
from delock.nets.split import Atom, StageModule, atoms, has_batch_norm, resolve_cuts, stages
from delock.plan import Course, check, unroll
from delock.records import StagePrediction, Started
from delock.stage import Loss, OptimizerFactory, ScheduleFactory
from delock.timeline import Costs, Emulation, Slowdown, predict
from delock.train import Job, Metric

Layout = Literal["default", "channels-last", "auto"]
SLOW_BATCHES = 400  # enough for a mean over random slow ticks
SLOW = 20  # an op on a machine that others use too may take so many times what it took when it was measured


@dataclass
class Spec:
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
    clip: float | None
    metrics: Mapping[str, Metric]
    heads: str | Sequence[nn.Module] | None
    seed: int
    device: str
    threads: int
    amp: bool
    layout: Layout
    chunks: int
    slow: Slowdown | None
    emulate: Emulation | None
    link: LinkKind
    log_every: int
    trace: bool
    workers: str
    codec: Codec | None = None
    error_codec: Codec | None = None
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
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise UsageError(f"clip is {self.clip:g}, but the norm that a gradient may keep must be above 0; leave it out not to clip")
        return Course(batches, every if self.test is not None else 0, len(self.test) if self.test is not None else 0, self.clip)


@dataclass
class Setup:
    """A run that has been checked: where the network is cut and what each atom costs."""

    course: Course
    parts: list[Atom]
    cuts: tuple[int, ...]
    costs: list[AtomCost]
    rows: int  # samples in the batch that was measured
    how: Computing
    modules: Sequence[StageModule | Emulated] = ()
    heads: dict[int, nn.Module] = field(default_factory=dict)  # stage -> its auxiliary head
    head_seconds: dict[int, float] = field(default_factory=dict)  # stage -> its head forward and backward, on a whole batch
    head_shares: dict[int, HeadShare] = field(default_factory=dict)  # stage -> what its head costs beside it

    @property
    def K(self) -> int:
        """Number of stages."""
        return len(self.cuts) + 1

    def patience(self, asked: float, method: Method) -> float:
        """Seconds to wait for a sign of life: what was asked for, but never less than an op of this network may well take."""
        slowest = max(slowdown(method, k) * sum(cost.total_s for cost in self.costs[a:b]) for k, (a, b) in enumerate(self.bounds()))
        return max(asked, SLOW * slowest) if asked > 0 else 0.0

    def bounds(self) -> list[tuple[int, int]]:
        """First atom, and the one after the last, of each stage."""
        edges = [0, *self.cuts, len(self.parts)]
        return list(itertools.pairwise(edges))

    def jobs(self, spec: Spec) -> list[Job]:
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
                codec=spec.codec,
                error_codec=spec.error_codec,
                link=spec.link,
                slow=spec.slow,
                how=self.how,
                emulated=spec.emulate is not None,
                log_every=spec.log_every,
                trace=spec.trace,
            )
            for k, module in enumerate(self.modules)
        ]

    def started(self, spec: Spec) -> Started:
        """What will run, with what the plan and the measured costs predict."""
        own = [self.costs[a:b] for a, b in self.bounds()]
        share = 1 / spec.method.parts  # costs are of a whole batch, ops of a part
        waits = spec.emulate
        forward = tuple(share * (waits.forward if waits else sum(cost.forward_s for cost in atoms)) for atoms in own)
        backward = tuple(share * (waits.backward if waits else sum(cost.backward_s for cost in atoms)) for atoms in own)
        head = tuple(share * self.head_seconds.get(k, 0.0) for k in range(self.K))
        forecast = predict(spec.method, self.K, Costs(forward, backward, head=head, slow=spec.slow), SLOW_BATCHES if spec.slow else None)
        own_pace = max(slowdown(spec.method, k) * (forward[k] + backward[k] + head[k]) for k in range(self.K))
        period = max(forecast.period, own_pace) if spec.workers != "inline" else sum(forward + backward + head) * spec.method.parts
        predictions = tuple(
            StagePrediction(
                stage=k,
                layers=len(own[k]),
                parameters=sum(cost.params for cost in own[k]),
                forward=forward[k],
                backward=backward[k],
                staleness=f.staleness,
                layer_staleness=f.layer_staleness,
                idle=f.idle,
                head_flops=beside.flops if (beside := self.head_shares.get(k)) else None,
                head_parameters=beside.params if beside else None,
            )
            for k, f in enumerate(forecast.stages)
        )
        return Started(
            method=title(spec.method),
            workers=spec.workers,
            batches=self.course.batches,
            epochs=self.course.batches / len(spec.train),
            cuts=self.cuts,
            stages=predictions,
            samples_per_second=self.rows / period,
            layout="channels last" if self.how.channels_last else "default",
            messages=tuple(int(self.costs[cut - 1].out_bytes * share) for cut in self.cuts),
            encoded=tuple(self._encoded(spec.codec, cut, spec.method.parts) for cut in self.cuts) if spec.codec else (),
        )

    def _encoded(self, codec: Codec, cut: int, parts: int) -> tuple[float, float]:
        """Bytes of the activation there once encoded, and of codebooks: means over the messages."""
        outputs = [((-(-shape[0] // parts), *shape[1:]) if shape else shape, dtype) for shape, dtype in self.costs[cut - 1].outputs]
        payload, books = zip(*(predicted(codec, shape, dtype) for shape, dtype in outputs), strict=True)
        return sum(payload), sum(books)


def prepare(spec: Spec, cuts: Sequence[int | str] | None) -> Setup:
    """Check everything that can be checked before the start, measure the network on a first batch, and cut it. Raises UsageError."""
    course = spec.course()
    if spec.slow and isinstance(spec.method, AsyncDGL) and spec.method.noise:
        raise UsageError("noise and straggle both make stages slower: use one of them")
    parts = atoms(spec.model)
    K = _number_of_stages(spec, cuts, len(parts))
    refuse_unfit(parts, K, cuts, spec.method, spec.train.sizes())
    inputs, targets = next(iter(spec.train.epoch(0)))
    how, costs = _choice(spec, parts, inputs, targets)
    if cuts is None:
        cuts = balance([cost.total_s for cost in costs], K, [cost.params for cost in costs])
    found = tuple(resolve_cuts(parts, cuts))
    _refuse_unfit_codecs(spec, [costs[cut - 1] for cut in found])
    heads = _heads(spec, K, [costs[cut - 1].shape for cut in found], costs[-1].shape)
    normed = [nn.ModuleList(atom.module for atom in parts), *heads.values()] if spec.chunks > 1 else [*heads.values()]
    if any(map(has_batch_norm, normed)):
        _refuse_single_samples(spec.train.sizes() or [], spec.method.parts * spec.chunks)
    shaped = {k: costs[found[k] - 1].shape for k in heads}
    seconds = {k: _head_cost(spec, how, k, head, (samples(inputs), *shaped[k]), targets) for k, head in heads.items() if shaped[k]}
    if spec.emulate:
        return Setup(course, parts, found, costs, samples(inputs), how, *_emulated(spec, spec.emulate, [*found, len(parts)], costs))
    modules = stages(parts, found)
    shares = _head_shares(modules, heads, [costs[cut - 1].shape for cut in found], inputs)
    return Setup(course, parts, found, costs, samples(inputs), how, modules, heads, seconds, shares)


def _emulated(
    spec: Spec, waits: Emulation, ends: Sequence[int], costs: Sequence[AtomCost]
) -> tuple[list[Emulated], dict[int, nn.Module]]:
    """Stages that wait, and heads that cost nothing, with outputs as large as the real ones."""
    share = 1 / spec.method.parts
    shapes = [costs[end - 1].shape for end in ends]
    if not all(shapes):
        raise UsageError("a stage whose output is a tuple cannot be emulated: cut elsewhere")
    modules = [
        Emulated(shape, share * waits.forward, share * waits.backward, jitter=waits.jitter, seed=key(spec.seed, "emulate", k))
        for k, shape in enumerate(shapes)
    ]
    return modules, {k: Emulated(shapes[-1], 0.0, 0.0) for k in spec.method.headed(len(ends))}


def _refuse_unfit_codecs(spec: Spec, cut: Sequence[AtomCost]) -> None:
    """Raise UsageError where a codec cannot take what a stage sends, or nothing is sent that it could take."""
    K = len(cut) + 1
    for k, cost in enumerate(cut):
        if spec.codec:
            check_codec(spec.codec, cost.outputs, f"stage {k}")
    if spec.error_codec and K > 1 and not any(step.down for column in unroll(spec.method, K, 1).columns for step in column):
        raise UsageError(f"{spec.method.name} sends no errors down, so there is none for an error codec: leave it out")


def _heads(spec: Spec, K: int, shapes: Sequence[tuple[int, ...]], logits: tuple[int, ...]) -> dict[int, nn.Module]:
    """The auxiliary heads of the stages that the method gives one. `shapes`: of the outputs of stages 0 .. K-2, for one sample."""
    wanted = spec.method.headed(K)
    given = spec.heads
    if given is not None and not spec.method.local_losses:
        raise UsageError(f"{spec.method.name} has no local losses, so it takes no heads")
    if given is not None and not isinstance(given, str):
        if len(given) != len(wanted):
            raise UsageError(f"{spec.method.name} in {K} stages needs {len(wanted)} auxiliary heads, but {len(given)} were given")
        return dict(zip(wanted, given, strict=True))
    return {k: _head(spec, k, shapes[k], logits) for k in wanted}


def _head(spec: Spec, k: int, shape: tuple[int, ...], logits: tuple[int, ...]) -> nn.Module:
    if not shape or not logits:
        raise UsageError(f"the output of stage {k} or of the network is a tuple, for which no head is known: give heads=[...] as modules")
    assert spec.heads is None or isinstance(spec.heads, str)
    return build_head(spec.heads or choose(shape), shape, logits[-1], seed=key(spec.seed, "head", k))


def _head_cost(spec: Spec, how: Computing, k: int, head: nn.Module, shape: tuple[int, ...], targets: Any) -> float:
    try:
        outputs = torch.zeros(shape, dtype=next((w.dtype for w in head.parameters()), None))
        return _measure(spec, how, [Atom(f"head of stage {k}", head)], outputs, targets)[0].total_s
    except UsageError as error:
        raise UsageError(f"the auxiliary head of stage {k} does not fit: {error}") from None


def _head_shares(
    modules: Sequence[nn.Module], heads: Mapping[int, nn.Module], shapes: Sequence[tuple[int, ...]], inputs: Any
) -> dict[int, HeadShare]:
    """What every head costs beside its stage, where that can be told. `shapes`: of the outputs of stages 0 .. K-2, for one sample."""
    shares = {}
    for k, head in heads.items():
        if k and not shapes[k - 1]:  # a tuple
            continue
        dtype = next(modules[k].parameters(), torch.zeros(())).dtype
        try:
            shares[k] = head_share(modules[k], head, inputs if k == 0 else torch.zeros(1, *shapes[k - 1], dtype=dtype))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # one sample is not enough for it: it can train, though
            continue
    return shares


def _choice(spec: Spec, parts: list[Atom], inputs: Any, targets: Any) -> tuple[Computing, list[AtomCost]]:
    """How to compute, and what the atoms cost then; of two layouts the one that is faster here and now."""
    layouts = {"default": (False,), "channels-last": (True,), "auto": (False, True)}[spec.layout]
    ways = [Computing(spec.amp, channels_last, spec.chunks) for channels_last in layouts]
    measured = [(how, _measure(spec, how, parts, inputs, targets)) for how in ways]
    return min(measured, key=lambda pair: sum(cost.total_s for cost in pair[1]))


def _measure(spec: Spec, how: Computing, parts: list[Atom], inputs: Any, targets: Any) -> list[AtomCost]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(spec.threads)
        return measure(parts, inputs, targets, spec.loss, device=spec.device, how=how)
    finally:
        torch.set_num_threads(before)


def _number_of_stages(spec: Spec, cuts: Sequence[int | str] | None, layers: int) -> int:
    if cuts is not None:
        if spec.stages not in (None, len(cuts) + 1):
            raise UsageError(f"{len(cuts)} cuts make {len(cuts) + 1} stages, but stages is {spec.stages}: give one of them")
        return len(cuts) + 1
    if spec.stages is not None:
        return spec.stages
    return layers if isinstance(spec.model, list | tuple | nn.ModuleList) else 2


def slowdown(method: Method, k: int) -> float:
    """How many times as long as it needs stage k is made to take by the method itself."""
    return method.slowdown(k) if isinstance(method, AsyncDGL) else 1.0


def refuse_wrong_workers(method: Method, workers: str) -> None:
    """Raise UsageError where stages should run freely in one process, or take turns in many."""
    if isinstance(method, AsyncDGL) and (method.turns == "free") == (workers == "inline"):
        if workers == "inline":
            raise UsageError("free-running stages need a process each: use workers processes, or turns sampled or round-robin")
        raise UsageError(f"{method.turns} turns are taken in one process: use workers inline, or turns free")


def refuse_wrong_link(method: Method, link: str, device: str) -> None:
    """Raise UsageError for a link between processes that there is not, or that does not go with the method or the device."""
    refuse_link(link, device)
    if link == "shared" and isinstance(method, AsyncDGL):
        raise UsageError(f'{method.name} drops messages that come too late, which only gloo can do: use link "auto" or "gloo"')


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
