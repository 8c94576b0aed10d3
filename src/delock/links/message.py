"""A message: the tensors that travel between stages, under a name that says for which op they are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from delock.errors import LinkError
from delock.tensors import Tree


class MessageKind(IntEnum):
    """The kinds of messages; over a wire travels the number."""

    ACTIVATION = 0  # of a training batch, on its way up
    EVALUATION = 1  # of a batch of an evaluation, on its way up
    ERROR = 2  # of a batch, on its way down
    GRADIENT_NORMS = 3  # of the stages above, before an update, on their way down
    TOTAL_NORM = 4  # of all gradients, on its way up
    END = 5  # of free-running stages. Going up: no more is to come; going down: all stages from here on are done
    MARK = 6  # of free-running stages, on its way up: a stage saves itself, with what has come before it and nothing that comes after


class MessageName(NamedTuple):
    """Says which message it is: both ends of a link compute it, and what comes must be what is due."""

    kind: MessageKind
    batch: int = 0  # or micro-batch; of norms the update
    loss: int = 0  # of an error: the stage whose loss it comes from
    version: int = 0  # of what a free-running stage sends: the updates that it has made; known to the sender alone


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors (or an error: a tuple of a tensor, or None, per floating input) and, on the way up, labels, weight of the loss, samples.

    weight: the share of its batch that a part is, by `count`; 0 where nothing in it counts, so that it gives no gradient.
    count: the number that means over batches are weighted by: the samples, or the result of `weight(targets)` of a loader's `Batches`.
    `values` is None for a part of a batch that has no samples; its weight is 0.
    agreed: on the way up, what all stages do at a tick that none of them has reached (see engine/agreement.py); -1: nothing.
    """

    values: Tree
    targets: Tree = None
    weight: float = 1.0
    samples: int = 0
    count: float = 0.0
    agreed: int = -1


def as_values(message: Message) -> dict[str, Any]:
    """Returns a message as plain values and tensors, for a checkpoint."""
    return {name: getattr(message, name) for name in Message.__dataclass_fields__}


def expect(got: MessageName, wanted: MessageName, source: int) -> None:
    """Raises LinkError unless the message that came is the one that the plan says."""
    if got != wanted and got[:3] != wanted[:3]:
        raise LinkError(f"stage {source} sent {_words(got)} where {_words(wanted)} was due: the stages do not follow the same plan")


def _words(name: MessageName) -> str:
    match name.kind:
        case MessageKind.ACTIVATION:
            return f"the activation of batch {name.batch}"
        case MessageKind.EVALUATION:
            return f"evaluation batch {name.batch}"
        case MessageKind.ERROR:
            return f"the error under loss {name.loss} of batch {name.batch}"
        case MessageKind.GRADIENT_NORMS:
            return f"the norms of update {name.batch}"
        case MessageKind.TOTAL_NORM:
            return f"the norm of update {name.batch}"
        case MessageKind.END:
            return "the end"
        case MessageKind.MARK:
            return f"the mark of a checkpoint at visit {name.batch}"
