"""The options of a run in six groups, which `fit`, a stage's job and the command line share. No torch.

A field is a keyword of its group in Python, an option of the same name on the command line (with hyphens) and a key of config.toml; the
text below it is the option's help. A value that is an object may also be given as the text that the command line takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from delock.codecs import Codec, parse, parse_error
from delock.errors import UsageError
from delock.methods.base import at_least, one_of
from delock.records import Visit
from delock.timeline import Emulation, Slowdown, straggler

PYTHON_ONLY = MappingProxyType({"flag": False})  # metadata of a field that no text can say
MOST_THREADS = 1024  # the thread pools under torch end the process with many more
MOST_WAIT = 10**6  # seconds, and how many times as long as it should a stage may take
WORDS: Mapping[Any, str] = MappingProxyType(
    {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path as text", NoneType: "None"}
)
"""The types of plain values, in the words of an error message."""


def check_types(values: object, names: Sequence[str] = ()) -> None:
    """Raises UsageError for an attribute with a value of another type than its class declares; names: those to look at, by default all."""
    kinds = get_type_hints(type(values))
    for name in names or kinds:
        if not fits(value := getattr(values, name), kinds[name]):
            raise UsageError(f"{name} is {value!r}, but it must be {in_words(kinds[name])}")


def fits(value: object, kind: Any) -> bool:
    """Returns whether a value is of a declared type. Entries of a sequence are not looked at, nor which text a literal may be."""
    match get_origin(kind):
        case origin if origin in (Union, UnionType):
            return any(fits(value, one) for one in get_args(kind))
        case origin if origin is Literal:
            return isinstance(value, str)
        case None if kind in (int, float):
            return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        case None:
            return isinstance(value, kind)
        case origin:
            return isinstance(value, origin) and not isinstance(value, str)


def in_words(kind: Any) -> str:
    """Returns a declared type in the words of an error message."""
    match get_origin(kind):
        case origin if origin in (Union, UnionType):
            return " or ".join(in_words(one) for one in get_args(kind))
        case origin if origin is Literal:
            return f"one of {', '.join(get_args(kind))}"
        case None:
            return WORDS.get(kind) or f"a delock.{kind.__name__}"
        case _:
            return "a sequence"


@dataclass(frozen=True)
class Execution:
    """The way every stage computes."""

    amp: Literal["no", "bf16"] = "no"
    """bf16: compute in bfloat16 by autocast; weights, gradients and optimizer stay in their own precision."""
    layout: Literal["default", "channels-last", "auto"] = "default"
    """Layout of images in memory; auto tries both on one batch and takes the faster."""
    chunks: int = 1
    """Slices in which a batch goes through a stage, so that each may stay in the cache; batch norm is then over a slice."""
    compile: bool = False
    """Compile every stage by torch.compile, before the first batch; evaluation, and batches smaller than the first, stay uncompiled."""
    captured: bool = False
    """With device cuda and workers inline: every tick as a CUDA graph, the stages on streams of one GPU. Experimental."""

    def __post_init__(self) -> None:
        check_types(self)
        one_of("amp", self.amp, ("no", "bf16"))
        one_of("layout", self.layout, ("default", "channels-last", "auto"))
        at_least("chunks", self.chunks, 1, 2**63 - 1)


@dataclass(frozen=True)
class Placement:
    """The processor cores of the stages, and what joins and watches their processes."""

    threads: int = 1
    """Threads per stage; with workers inline of all stages together."""
    pin: bool = True
    """Give each stage's process cores of its own, where the system can."""
    balance: Literal["counted", "measured"] = "counted"
    """Make stages even in counted work, with the same cuts in every run, or in measured time; cuts that are given stay as they are."""
    stage_memory: int | str | tuple[int | str, ...] | None = None
    """Most bytes that a stage may need, as 16G or 900Mi, for all or one per stage: cuts are chosen, or checked, by predicted memory."""
    link: Literal["auto", "gloo", "shared"] = "auto"
    """Between the processes: gloo (between GPUs NCCL), shared memory, or auto, shared memory where two stages are on one host."""
    patience: float = 120.0
    """Seconds without any progress after which the run is ended, more where one op is measured to take long; 0 is never."""

    def __post_init__(self) -> None:
        if isinstance(self.stage_memory, list):
            object.__setattr__(self, "stage_memory", tuple(self.stage_memory))
        check_types(self)
        if isinstance(self.stage_memory, int | str):
            object.__setattr__(self, "stage_memory", (self.stage_memory,))
        at_least("threads", self.threads, 1, MOST_THREADS)
        one_of("balance", self.balance, ("counted", "measured"))
        for one in self._limits:
            count_bytes(one)
        one_of("link", self.link, ("auto", "gloo", "shared"))
        at_least("patience", self.patience, 0)

    def limits(self, K: int) -> tuple[int, ...] | None:
        """Returns the most bytes that each of K stages may need. Raises UsageError for another number of limits than stages."""
        count = len(self._limits)
        if not count:
            return None
        if count not in (1, K):
            raise UsageError(f"stage_memory has {count} limits, but there are {K} stages: give one for all, or one for each")
        return tuple(map(count_bytes, self._limits)) * (K // count)

    @property
    def _limits(self) -> tuple[int | str, ...]:
        return self.stage_memory if isinstance(self.stage_memory, tuple) else ()


BYTES: Mapping[str, int] = MappingProxyType(
    {"": 1, **{x: 1000 ** (i + 1) for i, x in enumerate("KMGT")}, **{f"{x}i": 1024 ** (i + 1) for i, x in enumerate("KMGT")}}
)


def count_bytes(given: object) -> int:
    """Returns a number of bytes, which text may say in units: 16G, 1.5GB, 900Mi. Raises UsageError for others."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?i?)B?", given.strip(), re.IGNORECASE) if isinstance(given, str) else None
    unit = found[2].capitalize() if found else ""
    said = float(found[1]) * BYTES[unit] if found and unit in BYTES else 0
    count = given if isinstance(given, int) and not isinstance(given, bool) else said
    if count < 1:
        raise UsageError(f"stage_memory is {given!r}, but it must be a number of bytes, such as 16G (10^9) or 16Gi (2^30), at least 1")
    return int(count)


@dataclass(frozen=True)
class Compression:
    """The form in which activations and errors travel between the stages, in one process too."""

    codec: Codec | str | None = "none"
    """Codec of activations: none, bf16, int8 or vq, with settings as in vq:codes=256:dim=16:every=50."""
    error_codec: Codec | str | None = "none"
    """Codec of errors: none, bf16 or int8."""

    def __post_init__(self) -> None:
        check_types(self)
        _ = self.activations, self.errors  # raise UsageError for what does not exist

    @property
    def activations(self) -> Codec | None:
        """Returns the codec of activations."""
        return parse(self.codec)

    @property
    def errors(self) -> Codec | None:
        """Returns the codec of errors."""
        return parse_error(self.error_codec)


@dataclass(frozen=True)
class Simulation:
    """Conditions that are simulated around real messages: stragglers, stages that only wait, a run done again."""

    slow: Slowdown | str | None = None
    """Make a stage slower: 1:0.5, stage 1 takes half as long again; random:0.5, every stage does in one of K ticks."""
    emulate: Emulation | str | None = None
    """Wait F and B milliseconds (F:B, F:B:JITTER, F:B:JITTER:UPDATE) per batch and stage, and UPDATE per update, instead of computing;
    real messages. Nothing is learned."""
    replay: Sequence[Sequence[Visit]] | None = field(default=None, metadata=PYTHON_ONLY)
    """The visits of every stage in an earlier free-running run, from its VisitsRecords: with workers inline they are done again."""

    def __post_init__(self) -> None:
        check_types(self)
        waits, slow = self.waits, self.straggler(10**9, 0)
        if waits:
            for seconds in (waits.forward, waits.backward, waits.update):
                at_least("a wait of emulate, in seconds,", seconds, 0, MOST_WAIT)
        if slow:
            at_least("the factor of slow", slow.factor, 0, MOST_WAIT)

    def straggler(self, K: int, seed: int) -> Slowdown | None:
        """Returns the slow ticks of K stages. Raises UsageError for text that names another stage."""
        return straggler(self.slow, K, seed) if isinstance(self.slow, str) else self.slow

    @property
    def waits(self) -> Emulation | None:
        """Returns the seconds that every stage waits instead of computing."""
        return Emulation.parse(self.emulate) if isinstance(self.emulate, str) else self.emulate


@dataclass(frozen=True)
class Report:
    """The records of a run."""

    log_every: int = 10
    """Batches between two records of the training loss."""
    trace: bool = False
    """Keep the measured timeline: on the command line for Perfetto, as a picture, and as a table of where the time went."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least("log_every", self.log_every, 1)


UNITS: Mapping[str, float] = MappingProxyType({"s": 1.0, "m": 60.0, "h": 3600.0})


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoints of a run: their folder, their times, and the one that it goes on from."""

    folder: str | Path
    """Folder of the checkpoints; many hosts need a shared one."""
    every: int | str | None = None
    """Batches between two checkpoints, or a time: 30s, 10m, 2h. Without it they are made on signals alone."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    best: str | None = None
    """min:NAME or max:NAME: also keep the checkpoint that follows the best evaluation by this metric, or by loss."""
    resume: str | Path | None = None
    """newest, or the folder of a checkpoint: go on from it. newest begins anew where there is none."""
    grace: float = 30.0
    """Seconds within which a signal's checkpoint must be written."""
    restarts: int = 0
    """Times that a run is started again from its newest checkpoint after a stage has died, hung or failed."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("folder", "resume"):
            if (path := getattr(self, name)) is not None and (not str(path) or "\0" in str(path)):
                raise UsageError(f"{name} is {str(path)!r}, but it must be the path of a folder")
        _ = self.batches, self.seconds, self.judged  # raise UsageError
        at_least("keep", self.keep, 1)
        at_least("restarts", self.restarts, 0)
        at_least("grace", self.grace, 0)

    @property
    def batches(self) -> int | None:
        """Returns the batches between two checkpoints, if `every` says batches."""
        if not isinstance(self.every, int):
            return None
        at_least("every", self.every, 1)
        return self.every

    @property
    def seconds(self) -> float | None:
        """Returns the seconds between two checkpoints, if `every` says a time."""
        if not isinstance(self.every, str):
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", self.every)
        seconds = float(found[1]) * UNITS[found[2]] if found else math.nan
        if found and seconds < math.inf:
            at_least("every, in seconds,", seconds, 0)
        if not 0 < seconds < math.inf:
            raise UsageError(f"every is {self.every!r}, but it must be a number of batches, or a time such as 30s, 10m or 2h")
        return seconds

    @property
    def judged(self) -> tuple[str, bool] | None:
        """Returns the measure by which a checkpoint is the best, and whether more is better."""
        return None if self.best is None else monitored(self.best, "best")


# ---- callbacks that act on evaluations ---------------------------------------------------------------------------------------------


def monitored(text: str, what: str = "monitor") -> tuple[str, bool]:
    """Returns the measure of evaluations that a text names, as min:loss or max:accuracy, and whether more of it is better."""
    found = re.fullmatch(r"(min|max):(.+)", text)
    if not found:
        raise UsageError(f"{what} is {text!r}, but it must say which way is better: min:loss, max:accuracy")
    return found[2], found[1] == "max"


@dataclass(frozen=True)
class EarlyStopping:
    """Ends the run when a measure of its evaluations has become no better for a while; the weights are kept.

    If evaluation e decides it, the run is one of as many batches as were trained in front of evaluation e + 1, and ends as such a run does.
    """

    monitor: str = "min:loss"
    """min:NAME or max:NAME, by a metric's name, or loss."""
    patience: int = 3
    """Evaluations without a better one that end the run."""
    min_delta: float = 0.0
    """A difference up to that is none."""

    def __post_init__(self) -> None:
        check_types(self)
        monitored(self.monitor)
        at_least("patience", self.patience, 1)
        at_least("min_delta", self.min_delta, 0)


@dataclass(frozen=True)
class KeepBest:
    """Puts the weights of the best evaluation into the model at the end of the run: of every stage those that this evaluation saw."""

    monitor: str = "min:loss"
    """min:NAME or max:NAME, by a metric's name, or loss."""

    def __post_init__(self) -> None:
        check_types(self)
        monitored(self.monitor)


@dataclass(frozen=True)
class EMA:
    """Keeps a moving average of the weights, which every update of a stage enters: decay * average + (1 - decay) * weights."""

    decay: float = 0.999
    """The share of the average that stays."""
    evaluate: bool = True
    """Evaluate the average in place of the weights."""
    load: bool = True
    """Put the average into the model at the end of the run."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least("decay", self.decay, 0.0, 1.0)
        if not (self.evaluate or self.load):
            raise UsageError("EMA is neither evaluated nor put into the model, so it would change nothing: let it do one of these")


Acts: TypeAlias = EarlyStopping | KeepBest | EMA
"""The callbacks that act on stages."""
