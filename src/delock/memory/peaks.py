"""Computes the peak memory of a stage in a pass over its column of a plan, in bytes above the built stage before its first batch.

What PyTorch does. A stage holds weights, gradients, optimizer state, and for each batch on its way an input, a graph and an output.
Autograd frees a graph as a backward goes through it; a graph that saved a weight keeps the old values of it if the weight is replaced
meanwhile. Torch tells the peak only afterwards, on a CPU not even then.

Why that is not enough. How many batches are on their way, and how many versions of the weights, is no property of a network: it follows
from method, number of stages and place of the stage. Nor is the peak the sum of the largest parts. They are there at different times: a
gradient grows while the graph shrinks, and the state of an optimizer comes into being at the first Update, perhaps when all graphs are
there. What a process grows by is a third number: its heap keeps what is freed, for tensors of about the same size.

What we do. Every op of a plan has the same effect on the same stage, so a walk over the column of the stage counts exactly what is there
between any two ops: batches, graphs, copies of weights, gradients, messages in the links (`StageMemory`). The sizes of all these come from
a trial of each layer (`partition.layer_memory`), joined to stages (`memory.compose`), from the optimizer (`memory.optimizer`) and from
the links (`memory.sizes`). Within an op the peak above its begin is known from the same trial. The prediction of what lives is the largest
sum of the two. For the process, what has the sizes of weights and what has the sizes of activations have a peak each, and the heap has
to have room for both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from delock.memory.under_way import under_way
from delock.methods import Method
from delock.ops import Backward, Forward, Update
from delock.plan import Step, unroll
from delock.plan.pattern import patterns
from delock.timeline.copies import Copies

DEEP = 1 << 30  # more messages than any link keeps


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """Holds the bytes of a message that crosses a link in one direction, and the number of messages that an end keeps besides those in use.

    gloo keeps `depth` messages at either end: sent ones until `depth` newer ones are on their way, and buffers posted for coming ones.
    """

    message: int = 0
    depth: int = 0


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Holds the bytes of one stage. The bytes of an op are for a (micro-)batch; a peak is above the bytes alive at the begin of the op.

    A graph is all that autograd holds beside weights, the input and the outputs.
    """

    weights: int  # parameters that learn
    largest: int  # the largest of them
    state: int  # of the optimizer, the head's included, from the first Update on
    optimizer_step: int  # peak of a later step of the optimizer
    input: int  # a received message, beside shared memory; on stage 0 a whole batch
    graph: int
    output: int  # storages of the outputs, except those of the input
    delta: int  # errors of the inputs
    error: int  # received errors of the outputs, beside shared memory
    own_error: int  # the same if the stage makes them: by its own head, or by shrinking received ones
    forward: int  # peak, graph and outputs included
    forward_no_grad: int  # the same without a graph
    backward: int  # peak, the graph freed on the way; with gradients of weights and inputs, and its own loss, if any
    backward_retained: int  # the same if the graph stays
    backward_activations: int = 0  # the peak of activations and errors alone, the graph freed on the way
    backward_activations_retained: int = 0  # the same if the graph stays
    deferred_errors: int = 0  # errors into modules with weights, held between the two parts of a split backward
    weight_layers_graph: int = 0  # the part of the graph that only such modules hold, freed by the second part
    head: int = 0  # peak of the auxiliary head's forward and backward, with its gradient
    head_weights: int = 0
    slots: int = 0  # all memory shared with neighbours
    feeds: int = 0  # stage 0: micro-batches that are views of one batch
    message: int = 0  # a received message with its labels, wherever it lies
    fixed: int = 0  # parameters that do not learn, and buffers
    written: int = 0  # buffers that a forward writes to
    up_in: LinkBytes = LinkBytes()  # from the stage below
    up_out: LinkBytes = LinkBytes()
    down_in: LinkBytes = LinkBytes()  # from the stage above
    down_out: LinkBytes = LinkBytes()


@dataclass(frozen=True, slots=True)
class PeakBytes:
    """Holds peak bytes of a stage during a run, above the built stage before its first batch.

    `live`: tensors alive at one time. `resident`: growth of its process, with memory shared with neighbours, in a heap that keeps freed
    memory. Gradients, copies of weights and optimizer state have the sizes of weights; activations and errors have other sizes. A tensor of
    one group seldom fits into the place of one of the other, so each group has a peak of its own, and the process grows by the sum.
    `saved`: what a checkpoint copies, or holds until it is written; the other two include it.
    """

    live: int
    resident: int
    saved: int = 0

    def beside(self, kept: int, copied: int) -> PeakBytes:
        """Returns these peaks with memory beside them that is kept until the end; copied: the bytes of it that a checkpoint copies."""
        more = kept + (copied if self.saved else 0)
        return PeakBytes(self.live + more, self.resident + more, self.saved + (copied if self.saved else 0))

    def grows(self, device: str) -> int:
        """Returns the number to compare with the measurement, which on a GPU is the allocator's count of living bytes."""
        return self.resident if device == "cpu" else self.live


def peaks(method: Method, stages: Sequence[StageBytes], batches: int, *, saves: bool = False) -> list[PeakBytes]:
    """Returns the prediction for every stage of a run of `batches`, from its first batches, because a plan soon repeats itself.

    saves: the run is saved in checkpoints.
    """
    K = len(stages)
    columns = first_columns(method, K, batches)
    return [stage_peak(columns, k, sizes, saves=saves, mixed=method.fitted(K).mixed) for k, sizes in enumerate(stages)]


def first_columns(method: Method, K: int, batches: int) -> Sequence[Sequence[Step]]:
    """Returns every stage's steps in the first batches, after which none holds more than before."""
    method = method.fitted(K)
    return unroll(method, K, min(batches, repeating(method, K))).columns


def stage_peak(columns: Sequence[Sequence[Step]], k: int, sizes: StageBytes, *, saves: bool, mixed: bool) -> PeakBytes:
    """Returns the prediction for stage k from the steps of all stages."""
    found = peak(columns[k], StageMemory(k, sizes, saves=saves, mixed=mixed))
    return _with_late(found, sizes, under_way(columns, k)) if saves else found


def _with_late(peak: PeakBytes, sizes: StageBytes, late: tuple[int, int]) -> PeakBytes:
    """Adds the messages that a checkpoint waits for, from below and from above."""
    more = late[0] * sizes.up_in.message + late[1] * sizes.down_in.message
    return PeakBytes(peak.live + more, peak.resident + more, peak.saved + more)


def repeating(method: Method, K: int) -> int:
    """Returns a number of batches after which no stage, and no link, holds more than before."""
    deepest = max((method.capacity(k, K) for k in range(K - 1)), default=0)  # messages: a batch brings one per micro-batch
    groups = 3 + max(pattern.banks for pattern in patterns(method, K))  # older versions of the weights come one by one
    return 2 * method.span(K) + groups * method.batches_per_update + -(-deepest // method.micro_batches)


def peak(column: Iterable[Step], stage: StageMemory) -> PeakBytes:
    """Returns the peak bytes of a stage while it executes its column. What a checkpoint holds may be there all the time."""
    for step in column:
        stage.execute(step)
    saved = stage.most_saved
    return PeakBytes(stage.most + saved, stage.sizes.slots + stage.most_passing + stage.most_learned + saved, saved)


@dataclass(slots=True)
class HeldBatch:
    """Describes a batch between its Forward and its last Backward."""

    graph: bool


class StageMemory:
    """Counts the bytes of stage k step by step, in the order in which engine and stage allocate and free them.

    saves: it is saved in checkpoints; mixed: its derivatives are taken at="mixed", so that only then its graphs need copies of weights.
    """

    def __init__(self, k: int, sizes: StageBytes, *, saves: bool = False, mixed: bool = False) -> None:
        self.k, self.sizes, self.saves = k, sizes, saves
        self.most = self.most_passing = self.most_learned = self.most_saved = 0
        self.batches: dict[int, HeldBatch] = {}
        self.newest: int | None = None  # the batch that the feed has read last, and holds
        self.copies = Copies(for_all=saves and mixed)
        self.grads = self.head_grads = self.state = self.caught = 0
        self.backwards = 0  # since the last Update
        self.tick = 0
        self.sent: Counter[str] = Counter()
        self.posted: set[str] = set()

    @property
    def graphs(self) -> int:
        """Returns the number of live graphs."""
        return sum(held.graph for held in self.batches.values())

    @property
    def versions(self) -> int:
        """Returns the number of copies of the weights."""
        return len(self.copies.alive)

    @property
    def now(self) -> int:
        """Returns the bytes alive between two steps."""
        return self.passing + self.learned

    @property
    def learned(self) -> int:
        """Returns those of the bytes that have the sizes of weights."""
        written = self.graphs * self.sizes.written if self.saves else 0
        return self.versions * self.sizes.weights + self.grads + self.head_grads + self.state + written

    @property
    def passing(self) -> int:
        """Returns those of the bytes that have the sizes of activations."""
        s = self.sizes
        inputs = {batch // s.feeds for batch in self.batches} | {self.newest} if s.feeds else set(self.batches)
        kept = [*((self._way(name), count) for name, count in self.sent.items()), *((self._way(name), DEEP) for name in self.posted)]
        links = sum(min(count, way.depth) * way.message for way, count in kept)
        return len(inputs) * s.input + self.graphs * (s.graph + s.output) + links + self.caught

    def rise(self, more: int, learned: int = 0, passing: int | None = None) -> None:
        """Notes a moment with `more` bytes than between two steps; `learned`, `passing`: the most of either kind in it."""
        self.most = max(self.most, self.now + more)
        self.most_learned = max(self.most_learned, self.learned + learned)
        self.most_passing = max(self.most_passing, self.passing + (more - learned if passing is None else passing))

    def execute(self, step: Step) -> None:
        """Executes one step. An evaluation holds no graph, and one message at a time."""
        if self.saves and step.tick > self.tick:
            self.tick, self.most_saved = step.tick, max(self.most_saved, self.recorded(step.version))
        match step.op:
            case Forward() as op:
                self._forward(step, op)
            case Backward() as op:
                self._backward(step, op)
            case Update() as op:
                self.copies.update(step)
                self._update(op)

    def recorded(self, version: int) -> int:
        """Returns what a checkpoint would copy and hold now: the current weights, older ones, gradients, state, and messages."""
        s, older = self.sizes, self.copies.saved - {(version, 0.0)}
        weights = (1 + len(older)) * s.weights + s.head_weights + s.fixed
        return weights + self.grads + self.head_grads + self.state + len(self.batches) * s.message + self.graphs * s.written

    def _forward(self, step: Step, op: Forward) -> None:
        s = self.sizes
        own = self._read(op)
        self.copies.forward(step)
        swapped = s.weights if op.weights.draws_out(step.version) and step.keep == "graph" and not step.snapshot else 0  # at="mixed"
        self.rise(swapped, learned=swapped)
        self.rise(own + (s.forward if step.keep == "graph" else s.forward_no_grad))
        if step.keep == "graph":
            self.batches[op.batch] = HeldBatch(True)
            own = 0
        elif step.keep == "input":
            self.batches[op.batch] = HeldBatch(False)
            own = s.output
        else:
            own += s.output
        if step.up:
            self._send("up_out", own)

    def _read(self, op: Forward) -> int:
        """Takes the input, and returns its bytes if no number counted between steps includes it yet."""
        s = self.sizes
        if not s.feeds:
            self.posted.add("up_in")
            return s.input
        if self.newest != op.batch // s.feeds:
            self.rise(s.input)  # the batch before is freed after this one is read
            self.newest = op.batch // s.feeds
        return 0

    def _backward(self, step: Step, op: Backward) -> None:
        s, held = self.sizes, self.batches[op.batch]
        if not held.graph:
            self.rise(s.forward)
            held.graph = True
        above = self._error(op)  # held by the op itself
        if op.part == "weights":
            self.rise(max(0, s.weights - (s.weight_layers_graph if step.last else 0)), learned=s.weights, passing=0)
            self.caught -= s.deferred_errors + s.delta
        elif op.part == "input":
            deferred_errors = s.deferred_errors if step.weights_later else 0
            self.rise(
                above + s.backward_retained - s.weights + deferred_errors, passing=above + s.backward_activations_retained + deferred_errors
            )
            self.caught += s.deferred_errors + s.delta if step.weights_later else 0
        else:
            more, passing = (s.backward, s.backward_activations) if step.last else (s.backward_retained, s.backward_activations_retained)
            self.rise(above + more, learned=s.weights, passing=above + passing)
        if step.last:
            held.graph = False
            above += s.output
        if op.part != "input":
            self._learn(op, above)
        if step.down:
            self._send("down_out", above + s.delta)
        if step.last:
            del self.batches[op.batch]
            self.copies.drop(op.batch)

    def _error(self, op: Backward) -> int:
        """Takes the error of the outputs, from the stage above or the own head; the last stage's loss is part of its backward."""
        s = self.sizes
        if op.part == "weights" or (op.loss == self.k and not s.head):
            return 0
        if op.loss == self.k:
            self.rise(s.head, learned=s.head_weights)
            self.head_grads = s.head_weights
            return s.own_error
        self.posted.add("down_in")
        return s.error if op.shrink == 1 else s.error + s.own_error

    def _learn(self, op: Backward, above: int) -> None:
        """Adds new gradients to the old ones, which are freed one by one."""
        s = self.sizes
        if op.weight != 1:
            self.rise(above + 2 * s.weights, learned=2 * s.weights)
        if self.grads:
            self.rise(above + s.weights + s.largest, learned=s.weights + s.largest)
        self.grads = s.weights
        self.backwards += 1

    def _update(self, op: Update) -> None:
        s, grads = self.sizes, self.grads + self.head_grads
        mean = grads if op.reduce == "mean" and self.backwards > 1 else 0
        more = mean + s.optimizer_step + s.state - self.state
        self.rise(more, learned=more)
        self.state, self.grads, self.head_grads, self.backwards = s.state, 0, 0, 0

    def _send(self, way: str, above: int) -> None:
        """Packs a message, with `above` bytes alive besides; then the oldest sent message is freed if there are too many."""
        packed = self._way(way)
        self.rise(above + (packed.message if packed.depth else 0))
        self.sent[way] += 1

    def _way(self, name: str) -> LinkBytes:
        way: LinkBytes = getattr(self.sizes, name)
        return way
