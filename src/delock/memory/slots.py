"""Counts the slots in the memory that two stages share: the largest number of messages in use at one time.

A message has a slot from the end of the op that makes it until its receiver has used it for the last time and has said so. The receiver
says so with its next word to the sender: when it takes another message, or sends one of its own.

    sender      pack m ----------------------------------------------------- the slot is free
    receiver           take m ... last op on m | take another, or send -----^
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from statistics import fmean
from typing import TypeAlias

from delock.methods import Method
from delock.ops import Backward, Evaluate, Op, Update
from delock.plan import Product, RunLength, gives, received
from delock.plan.pattern import patterns
from delock.plan.unroll import column
from delock.timeline import Costs, Times, capacities, clocked
from delock.timeline.measures import at_once
from delock.timeline.spans import Timed

DRIFT = 1.3  # factor by which one stage may be slower than the others for a while


@dataclass(frozen=True, slots=True)
class Stay:
    """Holds a message's time in its slot: from the end of op `made` of its sender to the start or the end of op `freed` of its receiver."""

    made: int
    freed: int | None  # None: to the end of the run
    at_end: bool = False


Stays: TypeAlias = list[tuple[list[Stay], list[Stay]]]
"""One pair per link: the stays of its activations, and of its errors."""


def slots(timeline: Timed, decoded: tuple[bool, bool] = (False, False)) -> list[tuple[int, int]]:
    """Returns per link the numbers of slots for activations and for errors.

    decoded: (activations, errors), True if they are decoded on arrival, which is then the last use of the message.
    """
    return taken_at_once(stays(timeline.times.ops, decoded), timeline.times)


def slots_of_any(method: Method, batches: int, costs: Costs, decoded: tuple[bool, bool] = (False, False)) -> list[tuple[int, int]]:
    """Returns the largest numbers of slots in several runs: with measured costs, with equal stages, and with one of these slower.

    Stages that share cores behave now like one of these runs, now like another.
    """
    K = costs.K
    measured, stages = replace(costs, capacity=capacities(method, K)), patterns(method, K)
    alike = [fmean(own) for own in (costs.forward, costs.backward, costs.head)]

    def even(slow: int | None) -> Costs:
        forward, backward, head = (tuple(cost * (DRIFT if k == slow else 1) for k in range(K)) for cost in alike)
        return replace(measured, forward=forward, backward=backward, head=head)

    found = stays([[step.op for step in column(pattern, RunLength(batches))] for pattern in stages], decoded)
    runs = [taken_at_once(found, clocked(stages, batches, own).times) for own in (measured, *map(even, (None, *range(K))))]
    return [(max(up for up, _ in link), max(down for _, down in link)) for link in zip(*runs, strict=True)]


def taken_at_once(found: Stays, times: Times) -> list[tuple[int, int]]:
    """Returns the slots from stays. These are the same for all costs, because the order of a stage's ops does not depend on the clock."""

    def most(sender: int, receiver: int, messages: Sequence[Stay]) -> int:
        made, freed = times.ends[sender], (times.starts[receiver], times.ends[receiver])
        return at_once([(made[one.made], inf if one.freed is None else freed[one.at_end][one.freed]) for one in messages])

    return [(most(k, k + 1, up), most(k + 1, k, down)) for k, (up, down) in enumerate(found)]


def stays(columns: Sequence[Sequence[Op]], decoded: tuple[bool, bool] = (False, False)) -> Stays:
    """Returns the stays of all messages of a plan, which is given as the ops of every stage."""
    taken = [[None if isinstance(op, Update) else next(iter(received(k, op)), None) for op in ops] for k, ops in enumerate(columns)]
    wanted = {name for names in taken for name in names}  # norms are not: they take no slot
    sent = [[next((name for name in gives(k, op) if name in wanted), None) for op in ops] for k, ops in enumerate(columns)]
    stages = [_Stage(k, *parts) for k, parts in enumerate(zip(columns, taken, sent, strict=True))]
    return [(_between(a, b, decoded[0]), _between(b, a, decoded[1])) for a, b in pairwise(stages)]


@dataclass(frozen=True, slots=True)
class _Stage:
    """Holds a stage's ops, and for each the message that it takes and the one that it sends."""

    k: int
    ops: Sequence[Op]
    taken: Sequence[Product | None]
    sent: Sequence[Product | None]


def _between(sender: _Stage, receiver: _Stage, copied: bool) -> list[Stay]:
    """Returns the stays of the messages of one direction.

    The receiver is done with an activation after the last op on its batch, with an error after the op that takes it. It says so at the
    start of the next op that takes a message, or at the end of the next that sends one back.
    """
    made = {name: i for i, name in enumerate(sender.sent) if name}
    last = {_batch(op): i for i, op in enumerate(receiver.ops)}
    found: list[Stay] = []
    used: dict[int, list[int]] = defaultdict(list)  # op -> messages that it uses for the last time
    done: list[int] = []  # messages used for the last time, of which the sender does not know yet
    for i, (op, name, answer) in enumerate(zip(receiver.ops, receiver.taken, receiver.sent, strict=True)):
        if name in made:
            found += [Stay(message, i) for message in done]
            done = [made[name]] if copied else []
            if not copied:
                used[last[_batch(op)] if sender.k < receiver.k else i].append(made[name])
        if answer and isinstance(op, Backward) == (sender.k < receiver.k):
            found += [Stay(message, i, at_end=True) for message in done]
            done = []
        done += used.pop(i, [])
    return found + [Stay(message, None) for message in done]


def _batch(op: Op) -> tuple[int, bool] | None:
    """Returns the batch that an op is about; those of evaluations count by themselves."""
    return None if isinstance(op, Update) else (op.batch, isinstance(op, Evaluate))
