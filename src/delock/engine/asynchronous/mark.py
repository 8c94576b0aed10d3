"""The mark of a checkpoint: it travels up among the activations, and every stage saves itself when it has come.

    stage k - 1   ... a5 a6 [mark] a7 a8 ...     saves itself between two visits, and sends the mark behind all that it has sent
    stage k       a5 a6 into its buffer; a7 waits until the stage, between two visits, has saved itself and passed the mark on

So a stage that is saved has read only what the saved stage below has made. Messages behind the mark are no part of the checkpoint: a run
that goes on from there makes others. Evaluations are whole on one side of it.
"""

from __future__ import annotations

from typing import NamedTuple

from delock.engine.agreement import Wish
from delock.links.message import MessageKind, MessageName


class Mark(NamedTuple):
    """Says which checkpoint it is: the visits and updates that stage 0 had made, and if the run ends there."""

    tick: int  # visits of stage 0
    batches: int  # its updates
    wish: Wish

    @property
    def message(self) -> MessageName:
        """Returns the name under which it travels."""
        return MessageName(MessageKind.MARK, self.tick, self.wish, self.batches)

    @classmethod
    def of(cls, name: MessageName) -> Mark:
        """Returns the mark that travelled under that name."""
        return cls(name.batch, name.version, Wish(name.loss))
