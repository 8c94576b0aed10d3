"""The one dependency rule: what an op waits for, and what it makes that others may wait for."""

from __future__ import annotations

from typing import TypeAlias

from delock.ops import Backward, Evaluate, Forward, Op, Update, label

Product: TypeAlias = tuple[int, Op | tuple[int, int]]
"""(stage, what it makes): an error as (batch, loss), whichever part of a Backward sends it; an activation as Forward(batch), whatever
weights made it; any other op's product as the op itself."""


def needs(k: int, op: Op) -> list[Product]:
    """Returns what op of stage k waits for.

    A Forward waits for that of the stage below, named by its batch alone, because stages may use weights of different age; a Backward for
    its own Forward and for an error from above, named (batch, loss) because any part of a Backward may send it; a Backward of the weights
    alone for that of the input, which had the error.
    """
    match op:
        case Forward(b, source=source) if k > 0:
            return [(k - 1, Forward(b if source is None else source))]
        case Evaluate() if k > 0:
            return [(k - 1, op)]
        case Forward() | Evaluate():
            return []
        case Backward(b, loss, part="weights"):
            return [(k, (b, loss))]
        case Backward(b, loss):
            own: list[Product] = [(k, Forward(b))]
            return [*own, (k + 1, (b, loss))] if needs_error(k, op) else own
        case Update(over="network") if k > 0:
            return [(k - 1, op)]
        case Update():
            return []


def needs_error(k: int, op: Backward) -> bool:
    """True if a Backward of stage k needs an error from above."""
    return op.loss > k and op.part != "weights"


def received(k: int, op: Op) -> list[Product]:
    """Returns what op of stage k waits for that another stage makes: it comes in a message."""
    return [product for product in needs(k, op) if product[0] != k]


def gives(k: int, op: Op) -> list[Product]:
    """Returns what op of stage k makes, as `needs` may ask for it."""
    match op:
        case Forward(b):
            return [(k, Forward(b))]
        case Evaluate():
            return [(k, op)]
        case Backward(b, loss, _, part):
            return [(k, (b, loss))] if part != "weights" else []
        case Update(over="network"):
            return [(k, op)]
        case Update():
            return []


def named(what: Op | tuple[int, int]) -> str:
    """Returns the second half of a Product as an error shows it."""
    return f"B{what[0]} of the loss of stage {what[1]}" if isinstance(what, tuple) else label(what)
