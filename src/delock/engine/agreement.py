"""Agrees on one instant for all stages while they run: a tick that none of them has reached, before which each does the same thing.

Stages differ by D_k updates, so that "now" names no instant. Stage 0 decides, and says so with the activation that it sends next; every
stage hears of it with a Forward and passes it on with its own. A stage can be ahead of stage 0 only by the ticks that an activation takes
to it, so a tick beyond that is in front of all:

    stage 0 at tick t   decides for tick T = t + 1 + reach
    stage k             hears of it in its tick t + off_k at the latest, and acts when it comes to its first op of tick T or later

Nobody waits for anybody. What is under way between two stages at tick T comes to its receiver afterwards (see `Recorder`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from math import inf

from delock.links.message import Message
from delock.methods import Method
from delock.plan.steps import Step


class Wish(IntEnum):
    """Says what stage 0 wants of a tick."""

    NOTHING = -1
    SAVE = 0
    STOP = 1  # to save, and end there


class Agreement:
    """Stage k's part in it. wanted(tick): asked on stage 0 before every Forward, of the tick that a decision made now would name.

    act(T, wish): called once for every agreed tick. One that the run does not reach is not acted upon. What travels is 2 T + wish.
    """

    def __init__(self, method: Method, k: int, K: int, wanted: Callable[[int], Wish], act: Callable[[int, Wish], None]) -> None:
        self.k, self.wanted, self.act = k, wanted, act
        self.reach = reach(method, K)
        self.tick: float = inf  # agreed, and not reached yet
        self.wish = Wish.NOTHING

    def reached(self, step: Step) -> None:
        """Acts if this is the first step at the agreed tick or behind it."""
        if step.tick >= self.tick:
            tick, self.tick = int(self.tick), inf
            self.act(tick, self.wish)

    def heard(self, step: Step, message: Message) -> Message:
        """Returns the input of a Forward with the decision that goes on with it: one made here on stage 0, one that came on the others."""
        tick = step.tick + 1 + self.reach
        if self.k == 0 and self.tick == inf and (wish := self.wanted(tick)) is not Wish.NOTHING:
            self.tick, self.wish = tick, wish
            return replace(message, agreed=2 * tick + wish)
        if self.k > 0 and message.agreed // 2 > step.tick:  # else it was acted upon before the run was resumed
            self.tick, self.wish = message.agreed // 2, Wish(message.agreed % 2)
        return message


def reach(method: Method, K: int) -> int:
    """Returns the ticks by which any stage can be ahead of stage 0."""
    return max(-(-method.offset(stage, K) // method.micro_batches) for stage in range(K))
