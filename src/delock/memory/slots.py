"""How many messages lie in the memory that two stages share, as a pass over a timeline: it grows to the most there are at one time.

A message has a slot from the end of the op that makes it, until its receiver has used it for the last time and has told so. The receiver
tells with its next word to the sender, which is that it takes another message, or one of its own:

    sender      pack m ----------------------------------------------------- the slot is free
    receiver           take m ... last op on m | take another, or send -----^
"""

from __future__ import annotations

from collections.abc import Sequence

from delock.ops import Evaluate, Forward, Op, Update
from delock.plan import Product, gives, received
from delock.timeline.measures import at_once
from delock.timeline.spans import Span, Timeline


def slots(timeline: Timeline, decoded: tuple[bool, bool] = (False, False)) -> list[tuple[int, int]]:
    """Per link, the slots that activations and errors come to lie in. `decoded`: whether (they, these) are decoded as they come, which
    is then the last use of the message."""
    spans = [span for column in timeline.columns for span in column if _batch(span.op)]  # no Updates: a norm has no size
    wanted = {name for span in spans for name in received(span.stage, span.op)}
    made = {name: span.end for column in timeline.columns for span in column for name in gives(span.stage, span.op) if name in wanted}

    def most(sender: int, receiver: int, copied: bool) -> int:
        told = _told(timeline.columns[receiver], sender, made, copied)
        return at_once((made[name], free) for name, free in told.items())

    return [(most(k, k + 1, decoded[0]), most(k + 1, k, decoded[1])) for k in range(timeline.K - 1)]


def _told(column: Sequence[Span], sender: int, made: dict[Product, float], copied: bool) -> dict[Product, float]:
    """When the stage of that column tells `sender` that it is done with each of its messages; never, for the last of them."""
    told: dict[Product, float] = {}
    used: dict[int, list[Product]] = {}  # place in the column -> messages of which that is the last use
    done: list[Product] = []  # and not told
    last = {batch: i for i, span in enumerate(column) if (batch := _batch(span.op))}
    for i, span in enumerate(column):
        taken = [name for name in received(span.stage, span.op) if name[0] == sender and name in made]
        batch = _batch(span.op)
        if taken:
            told |= dict.fromkeys(done, span.start)
            done = taken if copied else []
        if taken and batch and not copied:
            used.setdefault(last[batch] if sender < span.stage else i, []).extend(taken)
        if _tells(span, sender, made):
            told |= dict.fromkeys(done, span.end)
            done = []
        done += used.pop(i, [])
    return told | dict.fromkeys(done, float("inf"))


def _batch(op: Op) -> tuple[int, bool] | None:
    """What an op is about: a batch, or one of an evaluation, which count by themselves."""
    return None if isinstance(op, Update) else (op.batch, isinstance(op, Evaluate))


def _tells(span: Span, to: int, made: dict[Product, float]) -> bool:
    """Whether the op ends with a message to that neighbour: an activation goes up, an error down."""
    sends = any(name in made for name in gives(span.stage, span.op))
    return sends and (to > span.stage) == isinstance(span.op, Forward | Evaluate)
