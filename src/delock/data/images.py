"""Holds labelled images in memory as bytes, and loads them as shuffled, augmented, normalised batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delock.data.augment import Augment
from delock.data.hashing import permutation
from delock.errors import UsageError
from delock.keys import key


@dataclass(frozen=True, eq=False)
class Images:
    """Holds pixels (N, C, H, W) uint8 and labels (N,) int64, both on the CPU. Raises UsageError for other shapes and dtypes.

    reopen: (function, arguments) that finds the same images in another process, if they lie in a file; a pickle then holds this pair
    in place of the bytes.
    """

    pixels: Tensor
    labels: Tensor
    reopen: tuple[Callable[..., Images], tuple[Any, ...]] | None = None

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4:
            raise UsageError(f"images must be a uint8 tensor (N, C, H, W), not {self.pixels.dtype} {tuple(self.pixels.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise UsageError(
                f"labels must be an int64 tensor ({len(self.pixels)},), one per image, not {self.labels.dtype} {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reopen or (Images, (self.pixels, self.labels))


@dataclass(frozen=True)
class Statistics:
    """Holds the mean and standard deviation of each channel, for pixels scaled to 0 .. 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def statistics(images: Images) -> Statistics:
    """Returns mean and standard deviation over all pixels of all images, from counts of the 256 values, so exact up to rounding."""
    channels = images.pixels.shape[1]
    counts = np.zeros((channels, 256), np.int64)
    for some in torch.split(images.pixels, 1024):  # bincount widens its input to int64: keep that copy small
        for c in range(channels):
            counts[c] += np.bincount(some[:, c].numpy().ravel(), minlength=256)
    share = counts / counts.sum(1, keepdims=True)  # (C, 256)
    value = np.arange(256) / 255
    mean = share @ value
    std = np.sqrt(np.maximum(share @ value**2 - mean**2, 0))
    return Statistics(tuple(mean.tolist()), tuple((s or 1.0) for s in std.tolist()))  # a constant channel is only centred


class ImageBatches:
    """Loads batches of `Images`: inputs (B, C, H, W) float32 normalised by `stats`, targets (B,) int64.

    With `shuffle`, the order of epoch e is a permutation that follows from (seed, e). The augmentation of a sample follows from
    (seed, e, index of the sample in `images`). Neither depends on the batch size or on the process. The last batch of an epoch holds the
    remaining samples. samples: indices to which the loader is restricted, (n,) int64.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        stats: Statistics,
        *,
        seed: int = 0,
        shuffle: bool = False,
        augment: Augment | None = None,
        samples: NDArray[np.int64] | None = None,
    ) -> None:
        """Raises UsageError for a batch size below 1."""
        if batch_size < 1:
            raise UsageError(f"batch size must be at least 1, not {batch_size}")
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.augment = augment
        self.samples = np.arange(len(images)) if samples is None else samples
        std = torch.tensor(stats.std, dtype=torch.float64).reshape(-1, 1, 1)
        mean = torch.tensor(stats.mean, dtype=torch.float64).reshape(-1, 1, 1)
        self._scale = (1 / (255 * std)).float()  # (C, 1, 1)
        self._shift = (-mean / std).float()

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def sizes(self) -> list[int]:
        return [min(self.batch_size, len(self.samples) - i) for i in range(0, len(self.samples), self.batch_size)]

    def order(self, e: int) -> NDArray[np.int64]:
        """Returns the samples of epoch e as indices into `images`, (n,) int64, in the order in which they are read."""
        return self.samples[permutation(key(self.seed, "order", e), len(self.samples))] if self.shuffle else self.samples

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(e)
        pixels, augment_key = self.images.pixels.numpy(), key(self.seed, "augment", e)
        for i in range(0, len(order), self.batch_size):
            samples = order[i : i + self.batch_size]
            batch = pixels[samples]  # (B, C, H, W) uint8, a copy
            if self.augment is not None:
                batch = self.augment(batch, samples, augment_key)
            # uint8 times float32 gives float32 in one pass
            yield torch.mul(torch.from_numpy(batch), self._scale).add_(self._shift), self.images.labels[torch.from_numpy(samples)]
