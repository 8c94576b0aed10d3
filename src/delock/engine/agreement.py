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
from math import inf

from delock.links.message import Message
from delock.methods import Method
from delock.plan.steps import Step


class Agreement:
    """Stage k's part in it. wanted(step): asked on stage 0 before every Forward; act(T): called once for every agreed tick.

    A tick that the run does not reach is not acted upon.
    """

    def __init__(self, method: Method, k: int, K: int, wanted: Callable[[Step], bool], act: Callable[[int], None]) -> None:
        self.k, self.wanted, self.act = k, wanted, act
        self.reach = max(-(-method.offset(stage, K) // method.micro_batches) for stage in range(K))
        self.tick: float = inf  # agreed, and not reached yet

    def reached(self, step: Step) -> None:
        """Acts if this is the first step at the agreed tick or behind it."""
        if step.tick >= self.tick:
            tick, self.tick = int(self.tick), inf
            self.act(tick)

    def heard(self, step: Step, message: Message) -> Message:
        """Returns the input of a Forward with the decision that goes on with it: one made here on stage 0, one that came on the others."""
        if self.k == 0 and self.tick == inf and self.wanted(step):
            self.tick = step.tick + 1 + self.reach
            return replace(message, agreed=int(self.tick))
        if self.k > 0 and message.agreed > step.tick:  # else it was acted upon before the run was resumed
            self.tick = message.agreed
        return message
