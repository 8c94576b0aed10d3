"""What a run reports, as plain values: what will run, steps, evaluations, a report per stage, the result. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from delock.timeline import Slowdown, Span


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """What the plan and the measured cost of its layers say about one stage before it runs."""

    stage: int
    layers: int  # atoms
    parameters: int
    forward: float  # seconds per (micro-)batch
    backward: float  # seconds per (micro-)batch
    staleness: float  # mean over a warm group of batches, in updates
    layer_staleness: int  # D_k, in batches
    idle: float  # share of the steady period
    head_flops: float | None = None  # multiply-adds of its auxiliary head over its own; None without a head, and where not known
    head_parameters: float | None = None  # the same of parameters
    memory: int | None = None  # bytes: what the process (on a GPU: its tensors) will grow by; None where the plan does not tell
    live: int | None = None  # bytes: of that, tensors that live at one time
    head: float = 0.0  # seconds per (micro-)batch of its auxiliary head, forward and backward


@dataclass(frozen=True, slots=True)
class Started:
    """The run is about to start: the prediction per stage, and the steady speed of the whole."""

    method: str  # as the user would write it, "adl(accumulate=2)"
    workers: str  # "processes", "inline", "torchrun"
    batches: int  # in the whole run
    epochs: float
    cuts: tuple[int, ...]
    stages: tuple[StagePrediction, ...]
    samples_per_second: float  # predicted
    layout: str = "default"  # of images in memory, or "channels last"
    compiled: bool = False  # by torch.compile; what layers cost was measured before
    slow: Slowdown | None = None  # ticks in which stages are made to take longer
    messages: tuple[int, ...] = ()  # bytes of an activation on each link
    encoded: tuple[tuple[float, float], ...] = ()  # with a codec: of it encoded, and of codebooks, means over the messages of each link


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One training batch as the last stage saw it."""

    batches: int  # trained so far, this one included
    epoch: float  # of them, in epochs
    loss: float
    lr: float
    samples: int  # samples trained since the start
    seconds: float  # of training, since the start, evaluations left out


@dataclass(frozen=True, slots=True)
class Visit:
    """One visit of a stage in a run with replay buffers: what it read, and what it did with it."""

    ordinal: int  # the stage's own; of an evaluation, the evaluation batch
    source: int  # ordinal on the stage below of the batch read (stage 0: of the data)
    trains: bool  # False once the stage has made all its updates
    version: int  # updates made before
    evaluates: bool = False
    sent: bool = True  # whether the activation went up
    start: float = 0.0  # seconds, on the stage's own clock
    end: float = 0.0


@dataclass(frozen=True, slots=True)
class VisitsRecord:
    """The next visits of one stage of a free-running run, which together are its plan."""

    stage: int
    visits: tuple[Visit, ...]


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One evaluation of the whole test set; train_loss is the mean over the batches since the evaluation before."""

    batches: int  # trained so far
    epoch: float
    train_loss: float
    test_loss: float
    metrics: dict[str, float]  # test metrics by name, "accuracy" (a fraction) for classification
    seconds: float  # of training, since the start, evaluations left out
    samples: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a stage has sent in one direction, evaluations included. In one process they are those that a wire would have carried."""

    messages: int = 0
    raw: int = 0  # of the activations, or errors, before a codec
    encoded: int = 0  # of them as they were sent, without codebooks
    codebooks: int = 0
    rest: int = 0  # headers, labels and what lies between the tensors

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in Traffic.__dataclass_fields__))

    @property
    def total(self) -> int:
        """All of them."""
        return self.encoded + self.codebooks + self.rest

    @property
    def compression(self) -> float | None:
        """How many times as many the raw ones are, before codebooks; None where there are none."""
        return self.raw / self.encoded if self.encoded else None

    @property
    def compression_with_codebooks(self) -> float | None:
        """The same with the codebooks among what was sent."""
        return self.raw / (self.encoded + self.codebooks) if self.encoded else None


@dataclass(frozen=True, slots=True)
class StageReport:
    """What one stage did, measured."""

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
    peak_memory: int  # bytes: of the process on CPU (0 where it cannot be told), of the allocator on a GPU
    memory_growth: int  # bytes: the peak above what the built stage held before the first batch, without pages of program files
    allocator: str = ""  # of the process: tcmalloc, jemalloc, glibc; "" on a GPU and where it cannot be told
    reuse: dict[int, int] = field(default_factory=dict)  # replay buffer, histograms: times that a batch was read -> batches
    visits_behind: dict[int, int] = field(default_factory=dict)  # visits of the stage below from batch read to newest put -> reads
    versions_behind: dict[int, int] = field(default_factory=dict)  # the same in its updates
    sent_up: Traffic = field(default_factory=Traffic)
    sent_down: Traffic = field(default_factory=Traffic)

    @property
    def idle(self) -> float:
        """Share of the training time that the stage waited or did nothing."""
        time = self.seconds - self.evaluation
        return max(0.0, 1 - (self.forward + self.backward + self.update) / time) if time > 0 else 0.0

    @property
    def mean_staleness(self) -> float:
        """Mean gradient staleness in updates, warm-up included."""
        return mean(self.staleness)

    @property
    def mean_layer_staleness(self) -> float:
        """Mean layer-wise staleness in batches, warm-up included."""
        return mean(self.layer_staleness)


@dataclass(frozen=True, slots=True)
class Result:
    """What `fit` returns. The trained weights are in the model that was passed in."""

    started: Started
    losses: list[float]  # one per batch, as the last stage computed them for the gradient
    evaluations: list[EvaluationRecord]
    stages: list[StageReport]
    seconds: float  # of training, evaluations left out
    samples_per_second: float
    samples: int
    spans: tuple[tuple[Span, ...], ...] = ()  # per stage, with Report(trace=True): every op on the clock of its host


Event = Started | StepRecord | EvaluationRecord | VisitsRecord


def mean(histogram: dict[int, int]) -> float:
    """The mean of a histogram; 0 for an empty one."""
    count = sum(histogram.values())
    return sum(value * n for value, n in histogram.items()) / count if count else 0.0
