"""Defines the numbers that turn a plan into a timeline: seconds of ops and links, slow ticks, emulated stages."""

from __future__ import annotations

import re
from dataclasses import dataclass

from delock.errors import UsageError
from delock.keys import key
from delock.ops import Backward, Evaluate, Forward, Op


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Defines stragglers: in a slow tick all ops of a stage take 1 + `factor` times as long.

    Every stage is slow with `probability` in every tick; with a `victim`, only that stage is. The draws are a function of (seed, tick,
    stage), so that a run can repeat those of a prediction. Raises UsageError for numbers out of range.
    """

    factor: float  # s of the DSP paper
    probability: float = 1.0
    victim: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.factor < 0 or not 0 <= self.probability <= 1:
            raise UsageError(f"a slow-down by {self.factor} with probability {self.probability}: it must be >= 0, and in [0, 1]")

    def extra(self, tick: int, stage: int) -> float:
        """Returns the share of its cost by which the stage is slower in this tick: 0 or `factor`."""
        if self.victim not in (None, stage):
            return 0.0
        return self.factor if key("slow", self.seed, tick, stage) < self.probability * 2**63 else 0.0


@dataclass(frozen=True, slots=True)
class Costs:
    """Holds seconds, or any other unit, per op: one number per stage for work, one per link for delays; link k joins stages k and k + 1.

    An empty tuple stands for a default: `replay` as `forward`, `capacity` unlimited, the others 0. With `barrier` every stage waits for all
    others after each tick (lock-step; for plans without evaluation). Raises UsageError if the numbers do not fit each other.

    backward: of all that the stage's Backward does, in one piece or in two halves. Stage 0 passes no error on, so it has no half of its own
    for its input and is never split, by no method: its number is that of its weights alone. So it is measured (the first layer's input
    needs no gradient), and so an emulated stage 0 waits. It is no less than that of other stages, because cuts even out the seconds.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    replay: tuple[float, ...] = ()
    update: tuple[float, ...] = ()
    head: tuple[float, ...] = ()  # an auxiliary head forward and backward, in the Backward of the stage's own loss
    up: tuple[float, ...] = ()  # delay of an activation k -> k + 1
    down: tuple[float, ...] = ()  # delay of an error k + 1 -> k
    capacity: tuple[int, ...] = ()  # messages that a link holds, in each direction
    barrier: bool = False
    slow: Slowdown | None = None

    def __post_init__(self) -> None:
        K = len(self.forward)
        given = [(name, getattr(self, name)) for name in ("forward", "backward", "replay", "update", "head", "up", "down", "capacity")]
        for name, numbers in given:
            due = K - 1 if name in ("up", "down", "capacity") else K
            if len(numbers) != due and (numbers or name == "backward"):
                raise UsageError(f"the cost {name} has {len(numbers)} numbers for {K} stages: it needs {due}")
            if min(numbers, default=1) < (name == "capacity"):
                raise UsageError(f"the cost {name} is {numbers}, but it must be at least {int(name == 'capacity')} everywhere")
        if not sum(self.forward) + sum(self.backward) > 0:
            raise UsageError("no stage costs anything: give at least one a forward or a backward")

    @classmethod
    def unit(cls, K: int) -> Costs:
        """Returns forward 1, backward 2, replay 1 on every stage, and nothing else: the usual rule of thumb."""
        return cls(forward=(1.0,) * K, backward=(2.0,) * K)

    @property
    def K(self) -> int:
        """Returns the number of stages."""
        return len(self.forward)

    def work(self, k: int, op: Op, replayed: bool) -> tuple[float, float]:
        """Returns the seconds of op on stage k: of the part that needs no error from above (the recomputation), and of the rest."""
        match op:
            case Forward() | Evaluate():
                return 0.0, self.forward[k]
            case Backward(loss=loss, part=part):
                half = 1.0 if part == "both" else 0.5  # the two products of a layer's backward cost about the same
                head = self.head[k] if self.head and loss == k and part != "weights" else 0.0
                return (self.replay or self.forward)[k] * replayed, half * self.backward[k] + head
            case _:
                return 0.0, self.update[k] if self.update else 0.0

    def scale(self, k: int, tick: int) -> float:
        """Returns the factor by which the work of stage k takes longer in a tick; 1 in most ticks."""
        return 1.0 + (self.slow.extra(tick, k) if self.slow else 0.0)

    def delay(self, link: int, up: bool) -> float:
        """Returns the seconds that a message takes over a link."""
        delays = self.up if up else self.down
        return delays[link] if delays else 0.0


NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"


@dataclass(frozen=True, slots=True)
class Emulation:
    """Makes every stage wait instead of computing: seconds per batch, each longer or shorter by a share of at most `jitter`.

    update: seconds that an Update waits beside the optimizer's step, which has one number to learn: those of the real weights.
    """

    forward: float
    backward: float
    jitter: float = 0.0
    update: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Emulation:
        """Parses 320:640, 320:640:0.1 or 320:640:0.1:25, in milliseconds. Raises UsageError for anything else."""
        match = re.fullmatch(rf"{NUMBER}:{NUMBER}(?::{NUMBER}(?::{NUMBER})?)?", text)
        if not match or float(match[3] or 0) >= 1 or float(match[1]) + float(match[2]) <= 0:
            forms = "F:B, F:B:JITTER or F:B:JITTER:UPDATE, milliseconds and a share below 1: 320:640:0.1"
            raise UsageError(f"emulate is {text!r}, but it must be {forms}")
        return cls(float(match[1]) / 1e3, float(match[2]) / 1e3, float(match[3] or 0), float(match[4] or 0) / 1e3)


def straggler(text: str, K: int, seed: int) -> Slowdown:
    """Parses 1:0.5, where stage 1 always takes half as long again, or random:0.5, where every stage does in a tick with probability 1/K.

    Raises UsageError for anything else.
    """
    match = re.fullmatch(rf"(\d{{1,30}}|random):{NUMBER}", text)
    if not match:
        raise UsageError(f"slow is {text!r}, but it must be STAGE:S or random:S, such as 1:0.5: S is by how much a slow tick is longer")
    if match[1] == "random":
        return Slowdown(float(match[2]), 1 / K, seed=seed)
    if int(match[1]) >= K:
        raise UsageError(f"slow is {text!r}, but the stages are 0 .. {K - 1}")
    return Slowdown(float(match[2]), victim=int(match[1]), seed=seed)
