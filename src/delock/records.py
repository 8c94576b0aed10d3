"""Defines the reports of a run as plain values: prediction, batches, evaluations, a report per stage, the result. It loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delock.timeline import Slowdown, Span


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """Holds the prediction for one stage, from the plan and the measured costs of its layers."""

    stage: int
    layers: int  # number of its layers
    parameters: int
    forward: float  # seconds per (micro-)batch
    backward: float  # seconds per (micro-)batch
    staleness: float  # mean over a warm group of batches, in updates
    layer_staleness: int  # D_k, in batches
    idle: float  # share of the steady period
    head_flops: float | None = None  # multiply-adds of its auxiliary head divided by its own; None without a head, and if unknown
    head_parameters: float | None = None  # the same for parameters
    memory: int | None = None  # peak bytes of the process (on a GPU: of its tensors), above the built stage; None if unknown
    live: int | None = None  # peak bytes of tensors alive at one time, above the built stage
    head: float = 0.0  # seconds per (micro-)batch of its auxiliary head, forward and backward


@dataclass(frozen=True, slots=True)
class Started:
    """Announces that the run is about to start, with the prediction per stage and the steady speed of all."""

    method: str  # as the user would write it, "adl(accumulate=2)"
    workers: str  # "processes", "inline", "torchrun"
    batches: int  # in the whole run
    epochs: float
    cuts: tuple[int | str, ...]  # the first layer of each stage but the first; of a traced model by name
    stages: tuple[StagePrediction, ...]
    samples_per_second: float  # predicted
    layout: str = "default"  # of images in memory, or "channels last"
    compiled: bool = False  # by torch.compile; the costs of layers were measured before
    slow: Slowdown | None = None  # ticks in which stages are made to take longer
    messages: tuple[int, ...] = ()  # bytes of an activation on each link
    encoded: tuple[tuple[float, float], ...] = ()  # with a codec, per link: mean bytes of an encoded activation, and of its codebooks
    traced: str = ""  # of a model that is no chain: by what, and how exactly its pieces are the model


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Holds the loss of one training batch, as the last stage computed it."""

    batches: int  # trained so far, this one included
    epoch: float  # the same in epochs
    loss: float
    lr: float
    samples: int  # samples trained since the start
    seconds: float  # of training, since the start, evaluations left out


@dataclass(frozen=True, slots=True)
class Visit:
    """Holds one visit of a stage in a run with replay buffers: the batch that it read, and its use."""

    ordinal: int  # the stage's own; of an evaluation, the evaluation batch
    source: int  # ordinal on the stage below of the batch read (stage 0: of the data)
    trains: bool  # False once the stage has made all its updates
    version: int  # updates that the stage had made
    evaluates: bool = False
    sent: bool = True  # the activation was sent up
    start: float = 0.0  # seconds, on the stage's own clock
    end: float = 0.0


@dataclass(frozen=True, slots=True)
class VisitsRecord:
    """Holds the next visits of one stage of a free-running run; all records together are the plan of the run."""

    stage: int
    visits: tuple[Visit, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """Says where a checkpoint cuts the visits of a free-running stage: where a run goes on from it, the later ones are void."""

    ordinal: int  # of the next visit
    evaluated: int  # evaluation batches so far
    held: tuple[int, ...] = ()  # batches in its replay buffer, by their ordinals on the stage below

    def keeps(self, visit: Visit) -> bool:
        """Returns True for a visit that was made before."""
        return visit.ordinal < (self.evaluated if visit.evaluates else self.ordinal)


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """Holds one evaluation of the whole test set, or of several.

    Several have names: metrics holds the loss and the metrics of each as "NAME/loss", "NAME/accuracy"; test_loss is that of the first.
    """

    batches: int  # trained so far
    epoch: float
    train_loss: float  # mean over the batches since the last evaluation
    test_loss: float
    metrics: dict[str, float]  # test metrics by name, "accuracy" (a fraction) for classification
    seconds: float  # of training, since the start, evaluations left out
    samples: int


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Holds the result of a batch of a session. metrics: of its outputs, by name, as they were in training."""

    number: int  # of the batch, from 0
    loss: float
    metrics: dict[str, float]
    lr: float  # of the coming update of the last stage
    samples: int
    outputs: Any = None
    """Outputs of the model, where they were asked for. Of a batch in parts they are the parts' tensors one after the other, or a list with
    those of every part, where their shapes differ beyond the rows."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Holds an evaluation in a session: means over the samples, or over what weighs them."""

    loss: float  # of several test sets that of the first
    metrics: dict[str, float]  # by name; of several test sets as NAME/accuracy, with NAME/loss
    samples: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counts the bytes that a stage has sent in one direction, evaluations included; in one process, those that a wire would carry."""

    messages: int = 0
    raw: int = 0  # of the activations, or errors, before a codec
    encoded: int = 0  # of the same as they were sent, without codebooks
    codebooks: int = 0
    rest: int = 0  # headers, labels, and gaps between the tensors

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in Traffic.__dataclass_fields__))

    @property
    def total(self) -> int:
        """Returns all bytes sent."""
        return self.encoded + self.codebooks + self.rest

    @property
    def compression(self) -> float | None:
        """Returns the ratio of raw to encoded bytes, without codebooks; None if nothing was sent."""
        return self.raw / self.encoded if self.encoded else None

    @property
    def compression_with_codebooks(self) -> float | None:
        """Returns the ratio of raw bytes to encoded bytes and codebooks; None if nothing was sent."""
        return self.raw / (self.encoded + self.codebooks) if self.encoded else None


@dataclass(frozen=True, slots=True)
class StageReport:
    """Holds the measurements of one stage."""

    stage: int
    parameters: int
    updates: int  # the final version
    forward: float  # seconds computing forwards
    backward: float  # seconds computing backwards, replays included
    update: float  # seconds in the optimizer
    waiting: float  # seconds waiting for messages, warm-up and drain included
    evaluation: float  # seconds of evaluation
    seconds: float  # from the first op to the last
    staleness: dict[int, int]  # histogram of gradient staleness: updates -> batches
    layer_staleness: dict[int, int]  # histogram of layer-wise staleness: batches -> batches
    peak_memory: int  # bytes: of the process on CPU (0 if unknown), of the allocator on a GPU
    memory_growth: int  # peak bytes above the built stage before its first batch, without pages of program files
    allocator: str = ""  # of the process: tcmalloc, jemalloc, glibc; "" on a GPU and if unknown
    reuse: dict[int, int] = field(default_factory=dict)  # with a replay buffer, histogram: times that a batch was read -> batches
    visits_behind: dict[int, int] = field(default_factory=dict)  # visits of the stage below from batch read to newest put -> reads
    versions_behind: dict[int, int] = field(default_factory=dict)  # the same in updates of the stage below -> reads
    sent_up: Traffic = field(default_factory=Traffic)
    sent_down: Traffic = field(default_factory=Traffic)
    saving: float = 0.0  # seconds that checkpoints took from training: to copy, and to wait for the disk

    @property
    def idle(self) -> float:
        """Returns the share of the training time in which the stage did not compute."""
        time = self.seconds - self.evaluation
        return max(0.0, 1 - (self.forward + self.backward + self.update) / time) if time > 0 else 0.0

    @property
    def mean_staleness(self) -> float:
        """Returns the mean gradient staleness in updates, warm-up included."""
        return mean(self.staleness)

    @property
    def mean_layer_staleness(self) -> float:
        """Returns the mean layer-wise staleness in batches, warm-up included."""
        return mean(self.layer_staleness)


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """Tells of a checkpoint that was written, or of one that could not be."""

    batches: int  # that stage 0 had begun
    path: str
    bytes: int = 0
    seconds: float = 0.0  # from the instant to the last file
    problem: str = ""  # why there is none; the run goes on
    last: bool = False  # the run ends here, as a signal has asked


@dataclass(frozen=True, slots=True)
class Resumed:
    """Announces that the run goes on from a checkpoint: what was reported of later batches is void."""

    batches: int  # that stage 0 had begun
    trained: int  # batches whose losses were known
    evaluations: int  # made
    path: str  # "" where there is none, and the run begins anew
    notes: tuple[str, ...] = ()  # what was passed over, what differs, what begins anew
    cuts: tuple[Cut, ...] = ()  # of free-running stages: the visits that count, of each


@dataclass(frozen=True, slots=True)
class Result:
    """Holds the result of `fit`. The trained weights are in the model that was passed in."""

    started: Started
    losses: list[float]  # one per batch, as the last stage computed them for the gradient
    evaluations: list[EvaluationRecord]
    stages: list[StageReport]
    seconds: float  # of training, evaluations left out
    samples_per_second: float
    samples: int
    spans: tuple[tuple[Span, ...], ...] = ()  # per stage, with Report(trace=True): every op on the clock of its host
    best: EvaluationRecord | None = None  # with KeepBest: that of the weights in the model
    stopped: str = ""  # why the run ended earlier than was planned, as EarlyStopping says it


Event = Started | StepRecord | EvaluationRecord | VisitsRecord | CheckpointRecord | Resumed


def mean(histogram: dict[int, int]) -> float:
    """Returns the mean of a histogram; 0 for an empty one."""
    count = sum(histogram.values())
    return sum(value * n for value, n in histogram.items()) / count if count else 0.0
