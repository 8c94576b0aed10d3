"""Reads the embedded data set: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels in 17 shades of grey, ten classes."""

from __future__ import annotations

import numpy as np
import torch

from delock.data.images import Images, statistics
from delock.data.source import Source

TEST_IMAGES = 360


def digits() -> Source:
    """Returns 1,437 training and 360 test images, stratified by class; the split does not depend on the seed of the run.

    Shades 0 .. 16 are scaled to 0 .. 240. Digits are not flipped, because a mirrored digit is not a digit.
    """
    from sklearn.datasets import load_digits  # takes 2 s to import: only for those who read digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    train, test = train_test_split(np.arange(len(found.target)), test_size=TEST_IMAGES, stratify=found.target, random_state=0)
    pixels = torch.from_numpy((found.images * 15).astype(np.uint8)).unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(found.target.astype(np.int64))
    training = Images(pixels[train], labels[train])
    return Source(training, Images(pixels[test], labels[test]), 10, statistics(training), flip=False)
