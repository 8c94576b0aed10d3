"""Defines Source, a data set before it is batched; the readers digits, vision, folder and synthetic return one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from delock.data.images import Images, Statistics

OnProgress: TypeAlias = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True, eq=False)
class Source:
    """Holds the training and test images of a data set."""

    train: Images
    test: Images
    classes: int
    stats: Statistics  # of the training images
    flip: bool  # a mirrored image is as good as the original
