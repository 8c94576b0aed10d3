"""Reads the embedded data set: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels in 17 shades of grey, ten classes.

The digits come from scikit-learn's own file and are split as scikit-learn would, without importing it, which takes a second.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from delock.data.images import Images, statistics
from delock.data.source import Source
from delock.errors import UsageError

TEST_IMAGES = 360
FILE = "datasets/data/digits.csv.gz"  # in scikit-learn: 64 pixels and the label, per line


def digits() -> Source:
    """Returns 1,437 training and 360 test images, stratified by class; the split does not depend on the seed of the run.

    Shades 0 .. 16 are scaled to 0 .. 240. Digits are not flipped, because a mirrored digit is not a digit.
    """
    found = _read()
    train, test = stratified_split(found[:, -1], TEST_IMAGES, np.random.RandomState(0))
    pixels = torch.from_numpy((found[:, :-1] * 15).astype(np.uint8)).reshape(-1, 1, 8, 8)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(found[:, -1].astype(np.int64))
    training = Images(pixels[train], labels[train])
    return Source(training, Images(pixels[test], labels[test]), 10, statistics(training), flip=False)


def _read() -> NDArray[np.int64]:
    """Returns pixels and label of every image, (1797, 65)."""
    spec = find_spec("sklearn")  # finds it without importing it
    try:
        path = Path(spec.origin if spec and spec.origin else "").parent / FILE
        rows: NDArray[np.int64] = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), np.int64, delimiter=",")
    except OSError as error:
        raise UsageError(f"the digits cannot be read from scikit-learn: {error}. Install scikit-learn again") from error
    return rows


def stratified_split(labels: NDArray[np.int64], test: int, generator: np.random.RandomState) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the indices of the training and of `test` test samples, every class in proportion, as train_test_split does."""
    counts = np.bincount(labels)
    trains = _in_proportion(counts, len(labels) - test, generator)
    tests = _in_proportion(counts - trains, test, generator)
    parts: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for label, (a, b) in enumerate(zip(trains, tests, strict=True)):
        mixed = np.flatnonzero(labels == label)[generator.permutation(counts[label])]
        parts[0].append(mixed[:a])
        parts[1].append(mixed[a : a + b])
    return generator.permutation(np.concatenate(parts[0])), generator.permutation(np.concatenate(parts[1]))


def _in_proportion(counts: NDArray[np.int64], total: int, generator: np.random.RandomState) -> NDArray[np.int64]:
    """Divides `total` in proportion to counts: rounds down, and gives the rest to the largest remainders, equal ones at random."""
    exact: NDArray[np.float64] = counts / counts.sum() * total
    shares: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    for remainder in np.unique(exact - shares)[::-1]:
        equal = np.flatnonzero(exact - np.floor(exact) == remainder)
        left = int(total - shares.sum())
        if left > 0:
            shares[generator.choice(equal, min(left, len(equal)), replace=False)] += 1
    return shares
