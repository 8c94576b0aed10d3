"""Makes images for benchmarks and quick runs: one random picture per class plus noise, so that a network can learn them."""

from __future__ import annotations

import torch
from torch import Tensor

from delock.data.images import Images, statistics
from delock.data.source import Source
from delock.errors import UsageError


def synthetic(
    images: int = 2048, test_images: int = 512, *, channels: int = 3, image_size: int = 32, classes: int = 10, seed: int = 0
) -> Source:
    """Returns random images (channels, image_size, image_size), `images` for training and `test_images` for testing.

    The label of image i is i modulo `classes`. Equal arguments give equal images. Raises UsageError for a count below 1.
    """
    counts = {"images": images, "test_images": test_images, "channels": channels, "image_size": image_size, "classes": classes}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"synthetic data: {name} must be at least 1, not {count}")
    generator = torch.Generator().manual_seed(seed)

    def noise(n: int, values: int) -> Tensor:
        return torch.randint(0, values, (n, channels, image_size, image_size), dtype=torch.uint8, generator=generator)

    pictures = noise(classes, 128)

    def sample(n: int) -> Images:
        labels = torch.arange(n) % classes
        return Images(pictures[labels] + noise(n, 128), labels)  # at most 127 + 127: no overflow

    train = sample(images)
    return Source(train, sample(test_images), classes, statistics(train), flip=True)
