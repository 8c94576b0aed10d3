"""A data set before it is batched: what each reader (digits, vision, folder, synthetic) returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from delock.data.images import Images, Statistics

OnProgress: TypeAlias = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True, eq=False)
class Source:
    """Training and test images, `stats` of the training images, and whether a mirror image is as good as the original (`flip`)."""

    train: Images
    test: Images
    classes: int
    stats: Statistics
    flip: bool
