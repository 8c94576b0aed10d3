"""Reads images from a directory laid out like ImageNet, DIR/train/CLASS/*.jpg and DIR/test (or val)/CLASS/*.jpg; decodes once, caches."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from delock.data import cache
from delock.data.decode import decode
from delock.data.images import Images, Statistics, statistics
from delock.data.scan import Listing, scan
from delock.data.source import OnProgress, Source
from delock.errors import UsageError

FORMAT = 1  # raise when the content of the cache file changes


def folder(directory: Path, *, image_size: int | None = None, on_progress: OnProgress | None = None) -> Source:
    """Returns the RGB images of a directory, all of one size: their own, or `image_size` x `image_size`, to which others are fitted.

    The decoded images are kept in one file in the cache directory and mapped from there. So a second start takes about a second, and
    a loader sent to another process carries only a path. The file is made again when the name, size or date of a file in DIR changes.
    Decoding needs memory for all images at once: 3 x height x width bytes each.
    on_progress(done, total): called with numbers of images while they are decoded.
    Raises UsageError for a missing directory, missing, empty or differing classes, a broken image, and images of several sizes.
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"image size must be at least 1, not {image_size}")
    train, test = scan(directory)
    fingerprint = _digest(f"{FORMAT} {image_size}", train.stamp, test.stamp)
    path = cache.cache_dir() / f"images-{_digest(str(directory.resolve()), str(image_size))}.pt"
    content = cache.read(path, fingerprint, verify=True)
    if content is None:
        _build(path, fingerprint, train, test, image_size, on_progress)
        content = cache.read(path, fingerprint, verify=False)
        if content is None:
            raise UsageError(f"the cache {path} was replaced while it was being made: are two runs reading a changing {directory}?")
    stats = Statistics(tuple(content["mean"]), tuple(content["std"]))
    return Source(
        _images(content, path, fingerprint, "train"), _images(content, path, fingerprint, "test"), len(train.classes), stats, flip=True
    )


def _build(path: Path, fingerprint: str, train: Listing, test: Listing, image_size: int | None, on_progress: OnProgress | None) -> None:
    pixels = decode([*train.files, *test.files], image_size, on_progress)
    cut = len(train.files)
    stats = statistics(Images(pixels[:cut], train.labels))
    content = {
        "fingerprint": fingerprint,
        "mean": list(stats.mean),
        "std": list(stats.std),
        "pixels": pixels,  # training images, then test images: a slice would be saved as all of its storage
        "labels": torch.cat([train.labels, test.labels]),
        "cut": cut,
    }
    cache.write(path, content)


def _images(content: dict[str, Any], path: Path, fingerprint: str, part: str) -> Images:
    these = slice(None, content["cut"]) if part == "train" else slice(content["cut"], None)
    return Images(content["pixels"][these], content["labels"][these], reopen=(_reopen, (str(path), fingerprint, part)))


def _reopen(path: str, fingerprint: str, part: str) -> Images:
    content = cache.read(Path(path), fingerprint, verify=False)
    if content is None:
        raise UsageError(f"the cache {path} has gone or changed since the run began: start the run again")
    return _images(content, Path(path), fingerprint, part)


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\x1f".join(parts).encode(errors="surrogateescape"), digest_size=12).hexdigest()
