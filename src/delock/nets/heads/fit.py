"""Finds heads that turn a stage's output into what the loss takes: by the shapes of both, here with the batch as their first axis."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from delock.nets.heads.build import Shape, build_head, choose
from delock.nets.heads.pooling import Resize, Transpose


@dataclass(frozen=True)
class Logits:
    """Describes what the loss takes: its shape, and the axis of its classes; 0: it has none, and a head predicts one number."""

    shape: Shape
    axis: int

    @classmethod
    def of(cls, shape: Sequence[int], targets: Sequence[int] = ()) -> Logits:
        """Returns the logits of a shape. targets: shape of the labels, which may tell one axis from the other.

        Classes stand last in (B, classes) and (B, T, classes), and first behind the batch in (B, classes, H, W).
        """
        shape = tuple(shape)
        if len(shape) < 2:
            return cls(shape, 0)
        first, last = (tuple(targets) == (*shape[:axis], *shape[axis + 1 :]) for axis in (1, len(shape) - 1))
        return cls(shape, len(shape) - 1 if last or (len(shape) < 4 and not first) else 1)

    @property
    def classes(self) -> int:
        """Returns the number of classes."""
        return self.shape[self.axis] if self.axis else 1

    @property
    def places(self) -> Shape:
        """Returns the sides of what has logits of its own in a sample: () for a class per sample, (T,), (H, W)."""
        return tuple(side for axis, side in enumerate(self.shape) if axis not in (0, self.axis))


def fitting(shape: Sequence[int], logits: Logits) -> str:
    """Returns the name of the head for a stage's output of this shape, or "" if none is known.

    Channels stand first in images, and last in tokens and in images whose first two sides are equal and the last is not.
    """
    own = tuple(shape[1:])
    if _per_token(shape, logits):
        return "transformer"
    if not own or shape[0] != logits.shape[0]:
        return ""
    if not logits.places:
        tokens = len(own) == 2 or (len(own) == 3 and own[0] == own[1] != own[2])
        return "tokens" if tokens else choose(own) if len(own) < 5 else ""
    return "pixels" if logits.axis == 1 and len(own) == 1 + len(logits.places) and len(own) < 5 else ""


def build_fitting(name: str, shape: Sequence[int], logits: Logits, seed: int) -> nn.Sequential:
    """Returns the head `name` with what is needed behind it to return logits of this shape. Raises UsageError as `build_head` does."""
    head = build_head(name, shape[1:], logits.classes, seed=seed)
    behind: dict[str, nn.Module] = {}
    if name == "pixels" and (sides := tuple(shape[2:])) != logits.places and len(sides) == len(logits.places):
        behind["resize"] = Resize([new / old for new, old in zip(logits.places, sides, strict=True)])
    if name == "transformer" and len(logits.shape) == 2:
        behind["flatten"] = nn.Flatten(0, 1)
    if name == "transformer" and len(logits.shape) == 3 and logits.axis == 1:
        behind["transpose"] = Transpose()
    if not logits.axis:
        behind["squeeze"] = nn.Flatten(0)
    return nn.Sequential(OrderedDict([*head.named_children(), *behind.items()])) if behind else head


def _per_token(shape: Sequence[int], logits: Logits) -> bool:
    """Returns True for tokens (B, T, C) that have logits each: (B, T, classes), (B, classes, T), or (B T, classes)."""
    if len(shape) != 3:
        return False
    flat = logits.axis == len(logits.shape) - 1 == 1 and logits.shape[0] == math.prod(shape[:2]) != shape[0]
    apart = shape[0] == logits.shape[0] and tuple(shape[1:2]) == logits.places and (logits.axis == 2 or shape[2] != shape[1])
    return flat or apart
