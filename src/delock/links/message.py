"""A message: the tensors that travel between stages, under a name that says for which op they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from delock.errors import LinkError
from delock.tensors import Tree

MessageName: TypeAlias = tuple[str, int, int]
"""What a message is: ("h", batch, 0) a training activation, ("e", batch, 0) an evaluation's, ("d", batch, loss) an error,
("n", update, 0) norms of gradients on their way down, ("t", update, 0) that of them all on its way up."""


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors (or an error: a tuple with one tensor per floating input) and, on the way up, labels, weight of the loss, sample count.

    `values` is None for a part of a batch that has no samples.
    """

    values: Tree
    targets: Tree = None
    weight: float = 1.0
    samples: int = 0


def expect(got: MessageName, wanted: MessageName, source: int) -> None:
    """Raise LinkError unless the message that came is the one that the plan says."""
    if got != wanted:
        raise LinkError(f"stage {source} sent {_words(got)} where {_words(wanted)} was due: the stages do not follow the same plan")


def _words(name: MessageName) -> str:
    kind, batch, loss = name
    error = f"the error under loss {loss} of batch"
    what = {"h": "the activation of batch", "e": "evaluation batch", "d": error, "n": "the norms of update", "t": "the norm of update"}
    return f"{what[kind]} {batch}"


def items(values: Tree) -> tuple[Any, ...]:
    """The tensors and payloads in a message's values."""
    return () if values is None else values if isinstance(values, tuple) else (values,)
