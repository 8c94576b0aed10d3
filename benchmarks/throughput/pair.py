"""Runs the two ranks of a configuration: every contender is built once, then they take turns, round by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from ceiling import CEILINGS
from ours import OURS
from peers import PEERS, SCHEDULES
from share import Here, Share, Turn, TurnReport
from works import WORKS

from delock.launch import allocator
from delock.launch.rank import Rank

CONTENDERS: Mapping[str, Callable[[Here], Turn]] = {**PEERS, **CEILINGS, **OURS}
EVEN = {*OURS, *CEILINGS}  # of whose batches an even number is on the clock: ADL updates after every second one


@dataclass
class Task:
    """Holds the task of a rank: turns of about this number of seconds, by these contenders, in these rounds."""

    share: Share
    names: list[str]
    rounds: range
    seconds: float


@dataclass
class Begun:
    """Says that a contender is about to be built, or to have its turn, in a process with that allocator."""

    name: str
    allocator: str


@dataclass
class Turned:
    """Says that a contender has had its turn; the turn before the first round has number -1; `batches` were on the clock."""

    name: str
    round: int
    batches: int
    reported: TurnReport


def pair(rank: Rank, task: Task) -> None:
    """Takes part in everything, and emits every outcome at once."""
    rank.open_group()
    here = Here(rank, WORKS[task.share.work], task.share)
    turns: dict[str, tuple[Turn, int]] = {}
    for name in task.names:
        _begin(rank, name, "the first turn")
        turn = CONTENDERS[name](here)
        dist.barrier()
        fewest = 2 if name in EVEN else 1
        reported = turn(fewest)
        rank.emit(Turned(name, -1, fewest, reported))
        turns[name] = turn, _batches(reported.seconds, task.seconds / 2 if name in SCHEDULES else task.seconds, fewest)
    for number in task.rounds:
        for name, (turn, batches) in turns.items():
            _begin(rank, name, f"round {number + 1}")
            dist.barrier()
            rank.emit(Turned(name, number, batches, turn(batches)))


def _begin(rank: Rank, name: str, when: str) -> None:
    rank.emit(Begun(name, allocator.in_use()))
    rank.progress.at(name[:32], when)


def _batches(own: float, seconds: float, fewest: int) -> int:
    """Returns the number of batches that take about this number of seconds on the slower rank, a multiple of the fewest."""
    slower = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    return max(1, round(seconds / float(slower) / fewest)) * fewest
