"""Says in the user's words why a model could not be cut: the line of its code at which tracing ended, and its parts."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from delock.errors import UsageError, said
from delock.partition.graph.guards import OtherSizesError

OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]), "<")
ON_VALUES = ("data-dependent", "control flow", "guard on")  # in torch's words
CHANCE = "draws a random number in Python's own steps"
ONE_SIZE = "holds for batches of one size alone"
INNER = "takes a gradient of its own"
NO_GRAPH = "does not require grad"  # in torch's words, of what is differentiated without a graph
ALONE = (
    "move it, with the layers through which the gradient goes, into a submodule, which stays whole, and compute it there within "
    "torch.enable_grad(), as stages also compute without gradients"
)
MOST = 160  # characters of torch's words


class DrawnError(Exception):
    """Raised if a model draws at random while it is traced. place: the line that draws, as `quoted` gives it; "" if it is not known."""

    def __init__(self, place: str = "") -> None:
        super().__init__(CHANCE)
        self.place = place


class InnerGradientError(Exception):
    """Raised if a model takes a gradient while it is traced: a graph would compute it without gradients, too, where there is none."""


@dataclass(frozen=True)
class Obstacle:
    """Holds why one tracer failed. place: file and line of the model's code, and the line itself; "" where none is known.

    far: how far it came. 0: tracing failed, 1: the graph is one that Delock refuses, 2: the pieces are not the model.
    """

    how: str
    reason: str
    place: str = ""
    far: int = 0

    def __str__(self) -> str:
        return f"{self.how}: {self.reason}{self.place and f' at {self.place}'}"


def obstacle(how: str, error: BaseException) -> Obstacle:
    """Returns what went wrong, with the innermost line of the model's own code."""
    if isinstance(error, DrawnError):
        return Obstacle(how, CHANCE, error.place, far=1)
    if isinstance(error, OtherSizesError):
        return Obstacle(how, f"{ONE_SIZE} ({error.problem})", far=1)
    if isinstance(error, UsageError):
        return Obstacle(how, str(error), far=1)
    frames = [frame for one in _chain(error) for frame in traceback.extract_tb(one.__traceback__) if not frame.filename.startswith(OWN)]
    place = quoted(frames[-1].filename, frames[-1].lineno or 0) if frames else ""
    if isinstance(error, InnerGradientError):
        return Obstacle(how, INNER, place, far=1)
    words = said(error).strip()
    return Obstacle(how, _shortened(words.splitlines()[0]) if words else type(error).__name__, place)


def _shortened(words: str) -> str:
    """Returns as many whole words as may be quoted."""
    return words if len(words) <= MOST else f"{words[:MOST].rpartition(' ')[0]} ..."


def quoted(file: str, number: int) -> str:
    """Returns a line of code as an error quotes it."""
    return f"{Path(file).name}:{number}, `{linecache.getline(file, number).strip()}`"


def furthest(failed: Sequence[Obstacle]) -> Obstacle:
    """Returns the failure of the tracer that came furthest; of several, the last one that knows a line of the model's code."""
    best = [one for one in failed if one.far == max(other.far for other in failed)]
    return next((one for one in reversed(best) if one.place), best[-1])


def refusal(model: nn.Module, failed: Sequence[Obstacle]) -> str:
    """Returns the sentence of the error."""
    why, remedy = _why_and_remedy(furthest(failed))
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in list(model.named_children())[:8])
    parts = f", or give an nn.Sequential of its parts: {children}" if children and remedy != ALONE else ""
    return f"cannot cut a {type(model).__name__} into stages: {why}; {remedy}{parts}"


def _why_and_remedy(told: Obstacle) -> tuple[str, str]:
    if told.reason == CHANCE:
        return (
            f"its forward {CHANCE}{told.place and f' at {told.place}'}, as to leave out a layer by chance, which a graph cannot repeat",
            "move the draw into a part that stays whole, multiply by a mask that is drawn as a tensor of the batch",
        )
    if told.reason.startswith(ONE_SIZE):
        return (
            f"its forward, when it is traced, {told.reason}, as with a loop over the samples, int(0.7 * len(x)), or a choice by that size",
            "compute with whole tensors, move that line into a part that stays whole",
        )
    if told.reason == INNER:
        return f"its forward {INNER}{told.place and f' at {told.place}'}", ALONE
    on_value = any(words in told.reason for words in ON_VALUES)
    why = f"its forward decides on a value at {told.place}" if on_value and told.place else f"its forward cannot be traced ({told})"
    return why, "decide on sizes and options instead, move that line into a part that stays whole" if on_value else "change that"


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found[::-1]
