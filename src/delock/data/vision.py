"""Reads CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST through torchvision from a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from delock.data.images import Images, statistics
from delock.data.source import Source
from delock.errors import UsageError


@dataclass(frozen=True)
class Kind:
    """Describes one of torchvision's data sets."""

    reader: str  # its class in torchvision.datasets
    folder: str  # the sub-directory in which this class looks for its files
    classes: int
    flip: bool  # a mirrored image is as good as the original


KINDS = MappingProxyType(
    {
        "cifar10": Kind("CIFAR10", "cifar-10-batches-py", 10, flip=True),
        "cifar100": Kind("CIFAR100", "cifar-100-python", 100, flip=True),
        "mnist": Kind("MNIST", "MNIST/raw", 10, flip=False),
        "fashion-mnist": Kind("FashionMNIST", "FashionMNIST/raw", 10, flip=True),
    }
)


def vision(name: str, directory: Path, *, download: bool = False) -> Source:
    """Reads the data set `name` (a key of KINDS) from `directory`; with `download` fetches its files into it first.

    Raises UsageError if files are missing or incomplete, or if the download fails.
    """
    import torchvision.datasets  # takes 4 s to import: only for those who read one of these

    kind = KINDS[name]
    reader = getattr(torchvision.datasets, kind.reader)

    def read(train: bool) -> Images:
        try:
            found = reader(directory, train=train, download=download)
        except (RuntimeError, OSError, EOFError, ValueError) as error:  # URLError is an OSError
            raise UsageError(_remedy(name, kind, directory, download, error)) from error
        pixels = torch.as_tensor(found.data)  # (N, H, W, 3) or (N, H, W)
        pixels = pixels.permute(0, 3, 1, 2) if pixels.dim() == 4 else pixels.unsqueeze(1)
        return Images(pixels.contiguous(), torch.as_tensor(found.targets, dtype=torch.int64))

    train = read(True)
    return Source(train, read(False), kind.classes, statistics(train), kind.flip)


def _remedy(name: str, kind: Kind, directory: Path, download: bool, error: Exception) -> str:
    if download:
        return f"{name} could not be downloaded into {directory}: {error}. Fetch it elsewhere and put it in {directory / kind.folder}"
    return (
        f"{name} is not (or not completely) in {directory / kind.folder}. Pass --download to fetch it, "
        f"or put torchvision's files there and pass --data-dir {directory}"
    )
