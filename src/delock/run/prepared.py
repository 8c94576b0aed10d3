"""A run that has been checked: it makes a job per stage and a prediction."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import nn

from delock.codecs import Codec
from delock.data.iterable import weigher
from delock.data.loader import LoadedBatch
from delock.data.named_sets import sets_of
from delock.links.connect import shares
from delock.memory.optimizer import fixed_bytes, learned, optimizer_bytes
from delock.memory.peaks import PeakBytes, peaks, repeating
from delock.memory.sizes import Outputs, RunLinks, stage_sizes
from delock.memory.slots import slots_of_any
from delock.methods import Method, spelled
from delock.nets.emulated import Emulated
from delock.nets.heads import HeadShare
from delock.options import EMA, Execution, KeepBest
from delock.partition.head_loss import HeadLoss
from delock.partition.layers import Layer
from delock.partition.measure import LayerCost
from delock.partition.stages import StageModule
from delock.plan import RunLength, sends_errors
from delock.records import StagePrediction, Started
from delock.run.job import StageJob
from delock.run.request import Request
from delock.run.survival.resume import Begin, conditions
from delock.tensors import Tree, split_bounds, tensors, tree_tensors
from delock.timeline import Costs, predict, stage_facts

SLOW_BATCHES = 400  # enough for a mean over random slow ticks
SLOW = 20  # factor by which an op may exceed its measured time on a machine that other programs use too


@dataclass(frozen=True)
class Batch:
    """Describes the batch that was measured: samples, shape and dtype of every tensor of the inputs, bytes of the labels."""

    rows: int
    inputs: Outputs
    targets: int

    @classmethod
    def of(cls, inputs: Any, targets: Any, counted: int | None = None) -> Batch:
        """Describes a loader's batch; counted: its samples, where a rule of the user's counts them."""
        shapes = tuple((tuple(x.shape), x.dtype) for x in tensors(inputs))
        return cls(LoadedBatch(inputs, targets, counted).samples, shapes, sum(x.nbytes for x in tree_tensors(targets)))


@dataclass
class PreparedRun:
    """Holds a run that has been checked: its request, the cuts, and the cost of each layer."""

    request: Request
    layers: list[Layer]
    cuts: tuple[int, ...]
    costs: list[LayerCost]
    batch: Batch
    execution: Execution  # the request's, its layout settled
    modules: Sequence[StageModule | Emulated] = ()
    heads: dict[int, nn.Module] = field(default_factory=dict)  # stage -> its auxiliary head
    head_costs: dict[int, LayerCost] = field(default_factory=dict)  # stage -> its head, on a whole batch
    head_losses: dict[int, HeadLoss] = field(default_factory=dict)  # stage -> the loss as its head's output is given to it
    head_shares: dict[int, HeadShare] = field(default_factory=dict)  # stage -> what its head costs beside it
    begin: Begin | None = None  # the checkpoint to go on from
    given: Method | None = None  # the request's method before it was fitted to K stages
    inputs: Tree = None  # on the meta device: a batch as it enters the network, for stages that are compiled

    @property
    def K(self) -> int:
        """Number of stages."""
        return len(self.cuts) + 1

    @property
    def places(self) -> tuple[int | str, ...]:
        """Returns the cuts as they are told and kept: of a traced model by name, because its layers are numbered anew for other cuts."""
        return self.cuts if self.request.network.split is None else tuple(self.layers[cut].name for cut in self.cuts)

    @property
    def length(self) -> RunLength:
        """Returns the length of the run."""
        return self.request.length()

    def patience(self) -> float:
        """Returns the seconds to wait for a sign of life: the request's, but at least SLOW times the longest op that was measured."""
        asked, method = self.request.placement.patience, self.request.method
        slowest = max(method.slowdown(k) * sum(cost.total_s for cost in self.costs[a:b]) for k, (a, b) in enumerate(self.bounds()))
        return max(asked, SLOW * slowest) if asked > 0 else 0.0

    def bounds(self) -> list[tuple[int, int]]:
        """Returns the first layer, and the one after the last, of each stage."""
        edges = [0, *self.cuts, len(self.layers)]
        return list(itertools.pairwise(edges))

    def conditions(self) -> dict[str, Any]:
        """Returns what must be the same when the run goes on from a checkpoint."""
        asked = replace(self.request, method=self.given or self.request.method)
        return conditions(asked, self.places, self.batch.rows, self.execution.layout)

    def jobs(self) -> list[StageJob]:
        """Returns a job per stage; only the first gets the data."""
        request, first = self.request, self.begin.first(self.places) if self.begin else 0
        return [
            StageJob(
                k=k,
                K=self.K,
                module=module,
                names=module.original,
                method=request.method,
                length=replace(self.length, first=first),
                per_epoch=len(request.train),
                weighed=weigher(request.train) is not None,
                optimizer=request.optimizer,
                schedule=request.schedule,
                loss=self.head_losses.get(k, request.criterion),
                metrics=request.metrics,
                seed=request.seed,
                train=request.train if k == 0 else None,
                test=request.test if k == 0 else None,
                tests={name: len(one) for name, one in sets_of(request.test).items()} if request.test is not None else {},
                head=self.heads.get(k),
                main=not request.network.chain,
                alone=not sends_errors(request.method, self.K),
                learns_below=any(w.requires_grad for one in self.modules[:k] for w in one.parameters()),
                execution=self.execution,
                placement=request.placement,
                compression=request.compression,
                simulation=request.simulation,
                report=request.report,
                checkpoint=request.checkpoint,
                callbacks=request.callbacks,
                begin=self.begin,
                conditions=self.conditions(),
                example=self._entering(k) if self.execution.compile else None,
                rows=self.batch.rows,
            )
            for k, module in enumerate(self.modules)
        ]

    def started(self) -> Started:
        """Returns what is known before the run: its shape, and the prediction from the plan and the measured costs."""
        request = self.request
        own = [self.costs[a:b] for a, b in self.bounds()]
        codec = request.compression.activations
        costs = self.ops()
        forward, backward, head = costs.forward, costs.backward, costs.head
        forecast = predict(request.method, self.K, costs, SLOW_BATCHES if costs.slow else None)
        update = costs.update or (0.0,) * self.K
        own_pace = max(request.method.slowdown(k) * (forward[k] + backward[k] + head[k] + update[k]) for k in range(self.K))
        work = sum(forward + backward + head) * request.method.micro_batches + sum(update) / request.method.batches_per_update
        period = max(forecast.period, own_pace) if request.workers != "inline" else work
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
                memory=most.grows(request.device) if most else None,
                live=most.live if most else None,
                head=head[k],
            )
            for k, (f, most) in enumerate(zip(forecast.stages, self.memory(), strict=True))
        )
        return Started(
            method=spelled(request.method),
            workers=request.workers,
            batches=self.length.batches,
            epochs=self.length.batches / len(request.train),
            cuts=self.places,
            stages=predictions,
            samples_per_second=self.batch.rows / period,
            layout=self.execution.layout.replace("-", " "),
            traced=request.network.traced(),
            compiled=self.execution.compile,
            slow=costs.slow,
            messages=tuple(self._message(cut) for cut in self.cuts),
            encoded=tuple(self._encoded(codec, cut) for cut in self.cuts) if codec else (),
        )

    def ops(self) -> Costs:
        """Returns the seconds of every stage's ops; where a method splits a batch, those of a micro-batch."""
        own = [self.costs[a:b] for a, b in self.bounds()]
        share, waits = 1 / self.request.method.micro_batches, self.request.simulation.waits
        forward = tuple(share * (waits.forward if waits else sum(cost.forward_s for cost in layers)) for layers in own)
        backward = tuple(share * (waits.backward if waits else sum(cost.backward_s for cost in layers)) for layers in own)
        head = tuple(share * (self.head_costs[k].total_s if k in self.head_costs else 0.0) for k in range(self.K))
        update = (waits.update,) * self.K if waits and waits.update else ()
        return Costs(forward, backward, update=update, head=head, slow=self.request.simulation.straggler(self.K, self.request.seed))

    def slots(self) -> list[tuple[int, int]] | None:
        """Returns the slots of activations and of errors that each link of shared memory will have; None for links of another kind."""
        request, compression = self.request, self.request.compression
        if request.workers == "inline" or not shares(request.placement.link, request.device):
            return None
        batches = min(self.length.batches, repeating(request.method, self.K))
        decoded = compression.activations is not None, compression.errors is not None
        return slots_of_any(request.method, batches, self.ops(), decoded)

    def memory(self) -> list[PeakBytes | None]:
        """Returns the peak bytes of each stage during training, above the built stage; None if they cannot be predicted.

        Those of free-running stages depend on the order in which messages come, those of compiled stages on the compiler.
        """
        request, unknown = self.request, self.heads.keys() - self.head_costs.keys()
        if request.simulation.emulate or request.execution.compile or not request.method.planned or unknown:
            return [None] * self.K
        ahead = request.workers != "inline" and torch.device(request.device).type == "cpu"
        ways = RunLinks(
            request.method, request.compression, [self.costs[cut - 1] for cut in self.cuts], self.batch.targets, self.slots(), ahead=ahead
        )
        weights = [learned(module, self.heads.get(k), k) for k, module in enumerate(self.modules)]
        facts = stage_facts(request.method, self.K)
        learning = [optimizer_bytes(request.optimizer, own, request.device, of) for own, of in zip(weights, facts, strict=True)]
        sizes = [
            stage_sizes(
                k, ways, self.costs[a:b], self.head_costs.get(k), optimizer, self.batch.inputs, fixed_bytes(module, self.heads.get(k))
            )
            for k, ((a, b), optimizer, module) in enumerate(zip(self.bounds(), learning, self.modules, strict=True))
        ]
        known = [one for one in sizes if one]
        if len(known) < self.K:
            return [None] * self.K
        found = peaks(request.method, known, self.length.batches, saves=request.checkpoint is not None)
        return [one.beside(*self._kept(module)) for one, module in zip(found, self.modules, strict=True)]

    def _kept(self, module: nn.Module) -> tuple[int, int]:
        """Returns the bytes of weights that callbacks keep beside a stage's own, and those of them that a checkpoint copies."""
        weights, buffers = (sum(one.nbytes for one in own) for own in (module.parameters(), module.buffers()))
        average = sum(weights for one in self.request.callbacks if isinstance(one, EMA))
        return sum(2 * (weights + buffers) for one in self.request.callbacks if isinstance(one, KeepBest)) + average, average

    def _message(self, cut: int) -> int:
        """Returns the bytes of an activation at a cut, a mean over the parts of a batch."""
        sent = sum(prod(part) * dtype.itemsize for part, dtype in self._sent(cut))
        return int(sent / self.request.method.micro_batches)

    def _entering(self, k: int) -> Tree:
        """Returns a batch as it enters stage k, on the meta device."""
        if k == 0:
            return self.inputs
        cost = self.costs[self.cuts[k - 1] - 1]
        made = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in cost.outputs)
        return made[0] if cost.shape or (len(made) == 1 and made[0].dim() < 2) else made

    def _encoded(self, codec: Codec, cut: int) -> tuple[float, float]:
        """Returns the bytes of the activation at a cut once encoded, and those of codebooks: means over the parts of a batch."""
        payload, books = zip(*(codec.predicted(part, dtype) for part, dtype in self._sent(cut)), strict=True)
        return sum(payload) / self.request.method.micro_batches, sum(books) / self.request.method.micro_batches

    def _sent(self, cut: int) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
        """Yields shape and dtype of all tensors that cross a cut for a batch, part by part."""
        cost, M = self.costs[cut - 1], self.request.method.micro_batches
        for i, (shape, dtype) in enumerate(cost.outputs):
            if i in cost.whole:
                yield from [(shape, dtype)] * min(M, self.batch.rows)  # other parts are empty
            else:
                yield from [((b - a, *shape[1:]), dtype) for a, b in split_bounds(shape[0], M)]
