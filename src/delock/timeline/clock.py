"""Runs the clock: all stages side by side, each of which goes on until it has to wait for a neighbour.

A stage waits for a message, which has a name, or for a place in a queue. Both depend only on what a neighbour does, so the order in which
stages go on does not matter. Each stage is a generator that stops where it waits, and the stage that it waits for resumes it. An op starts
when its stage is free and its message is there; it is looked at once, and waits at most twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeAlias

from delock.ops import Op
from delock.timeline.spans import Times


@dataclass(slots=True, eq=False)
class Queue:
    """Holds the messages from a stage to a neighbour."""

    sender: int
    receiver: int
    delay: float
    places: deque[float] | None = None  # second since which each of its places has been free; None: no limit
    sent: dict[Hashable, float] = field(default_factory=dict)  # name of a message under way -> second at which it was sent
    begins: list[float] = field(default_factory=list)  # of every message: the end of the op that made it
    ends: list[float] = field(default_factory=list)  # of every message: the start of the op that took it
    awaited: Hashable = None  # the message that the receiver waits for
    full: bool = False  # the sender waits for a place


Work: TypeAlias = tuple[int, Op, float, float, Hashable, Queue | None, Queue | None]
"""An op as the clock sees it: (tick, op, seconds of work that need no message, seconds of the rest, name of the message that it takes and
of the one that it sends, queue from which it takes, queue into which it sends)."""
Queues: TypeAlias = Mapping[tuple[int, str], Queue]
"""(stage that sends, "up", "down" or "norm") -> its queue."""


class Stuck(Exception):
    """Raised if stages wait for each other; names them."""

    def __init__(self, stages: Sequence[tuple[int, int, bool]]) -> None:
        super().__init__(stages)
        self.stages = stages  # (stage, ops it has done, whether it waits for room in a link)


class Clock:
    """Runs all stages through their programs."""

    def __init__(self, programs: Sequence[Iterable[Work]], queues: Queues) -> None:
        stages, self.queues = range(len(programs)), queues
        self.times = Times([[] for _ in stages], [[] for _ in stages], [[] for _ in stages])
        self.full: list[dict[int, float]] = [{} for _ in stages]  # op -> seconds before it in which its stage waited for room in a link
        self.stages = [self.stage(k, program) for k, program in enumerate(programs)]
        self.ready: deque[int] = deque()
        self.waits = ["" for _ in stages]  # "message", "room", or "" for none
        self.free = [0.0 for _ in stages]
        self.until, self.floor = inf, 0.0  # no stage goes beyond tick `until`, none begins the next one before second `floor`

    def run(self, ticks: Iterable[float]) -> None:
        """Lets the stages go to the end of each of these ticks, where they wait for each other. Raises Stuck."""
        for self.until in ticks:
            self.ready.extend(range(len(self.stages)))
            while self.ready:
                k = self.ready.popleft()
                self.waits[k] = next(self.stages[k], "")
            if stuck := [(k, len(self.times.ends[k]), waits == "room") for k, waits in enumerate(self.waits) if waits]:
                raise Stuck(stuck)
            self.floor = max(self.free)

    def under_way(self, k: int, way: str) -> list[tuple[float, float]]:
        """Returns the seconds (begin, end) between which each message that stage k sent up or down was under way."""
        queue = self.queues[k, way]
        return list(zip(queue.begins, queue.ends, strict=True))

    def stage(self, k: int, program: Iterable[Work]) -> Iterator[str]:
        """Goes through the program of stage k, and yields what it waits for: "message", "room", or "" for the next tick."""
        ops, starts, ends, full = self.times.ops[k], self.times.starts[k], self.times.ends[k], self.full[k]
        free = 0.0
        for tick, op, ahead, rest, name, takes, sends in program:
            while tick > self.until:
                self.free[k] = free
                yield ""
                free = self.floor
            begin = free + ahead
            if takes is not None:
                if name not in takes.sent:
                    takes.awaited = name
                    yield "message"
                arrival = takes.sent.pop(name) + takes.delay
                if arrival > begin:
                    begin = arrival
                takes.ends.append(begin - ahead)
                if takes.places is not None:
                    takes.places.append(begin)
                    if takes.full:
                        takes.full = False
                        self.ready.append(takes.sender)
            free = begin + rest
            ops.append(op)
            starts.append(begin - ahead)
            ends.append(free)
            if sends is not None:
                sends.begins.append(free)
                if sends.places is not None:
                    if not sends.places:
                        sends.full = True
                        yield "room"
                    waited = sends.places.popleft() - free
                    if waited > 0:
                        full[len(ends)] = waited
                        free += waited
                sends.sent[name] = free
                if sends.awaited == name:
                    sends.awaited = None
                    self.ready.append(sends.receiver)
        self.free[k] = free
