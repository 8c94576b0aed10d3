"""Loads data sets by name."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delock.data.augment import standard
from delock.data.cache import cache_dir
from delock.data.digits import digits
from delock.data.folder import folder
from delock.data.hashing import permutation
from delock.data.images import ImageBatches, Images
from delock.data.loader import Data
from delock.data.source import OnProgress, Source
from delock.data.synthetic import synthetic
from delock.data.vision import KINDS, vision
from delock.errors import UsageError
from delock.keys import key

NAMES = ("digits", *KINDS, "folder", "synthetic")


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    batch_size: int,
    seed: int = 0,
    download: bool = False,
    augment: bool = True,
    image_size: int | None = None,
    limit: int | None = None,
    test_batch_size: int | None = None,
    on_progress: OnProgress | None = None,
) -> Data:
    """Returns the data set `name` (one of NAMES) as a training and a test loader.

    data_dir: the directory of the images of "folder" or of torchvision's files (default for these: datasets in the cache directory).
    seed: decides the order and the augmentation of the training images, never their choice. The test loader has a fixed order.
    download: fetch torchvision's files into data_dir first.
    image_size: the size to which "folder" resizes its images and in which "synthetic" makes them; other sets accept None only.
    limit: train on this number of images, a fixed random choice (a smaller choice is part of a larger one); statistics are of all images.
    test_batch_size: by default batch_size.
    on_progress(done, total): called with numbers of images while they are decoded.
    Raises UsageError for an unknown name, data that is missing or unfit, and numbers out of range.
    """
    source = _source(name, Path(data_dir) if data_dir is not None else None, download, image_size, on_progress)
    _, channels, size, _ = source.train.pixels.shape
    train = ImageBatches(
        source.train,
        batch_size,
        source.stats,
        seed=seed,
        shuffle=True,
        augment=standard(size, flip=source.flip) if augment else None,
        samples=_choice(name, source.train, limit),
    )
    test = ImageBatches(source.test, batch_size if test_batch_size is None else test_batch_size, source.stats)
    return Data(train, test, source.classes, channels, size, name)


def _source(name: str, data_dir: Path | None, download: bool, image_size: int | None, on_progress: OnProgress | None) -> Source:
    if name == "folder":
        if data_dir is None:
            raise UsageError("data set folder needs --data-dir DIR, with DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg")
        return folder(data_dir, image_size=image_size, on_progress=on_progress)
    if name == "synthetic":
        return synthetic(image_size=32 if image_size is None else image_size)
    if name == "text":
        raise UsageError("text is no set of images: load it with delock.data.load_text")
    if name not in NAMES:
        known = (*NAMES, "text")
        near = difflib.get_close_matches(name, known, 1, 0.4)
        raise UsageError(f"unknown data set {name!r}{f': did you mean {near[0]!r}?' if near else ''} (known: {', '.join(known)})")
    if image_size is not None:
        raise UsageError(f"image size can be chosen for folder and synthetic only: the images of {name} are used as they are")
    return digits() if name == "digits" else vision(name, data_dir or cache_dir() / "datasets", download=download)


def _choice(name: str, images: Images, limit: int | None) -> NDArray[np.int64] | None:
    if limit is None:
        return None
    if not 1 <= limit <= len(images):
        raise UsageError(f"limit must lie between 1 and the {len(images)} training images of {name}, not {limit}")
    return np.sort(permutation(key("limit"), len(images))[:limit])
