"""Provides data loaders whose batches follow from (seed, epoch, sample), so that every method and number of stages gets the same."""

from delock.data.alphabet import Alphabet
from delock.data.augment import Augment
from delock.data.images import ImageBatches, Images, statistics
from delock.data.iterable import Batches, as_loader
from delock.data.load import NAMES, load
from delock.data.loader import Data, Loader
from delock.data.synthetic import synthetic
from delock.data.text import TextData, load_text

__all__ = [
    "NAMES",
    "Alphabet",
    "Augment",
    "Batches",
    "Data",
    "ImageBatches",
    "Images",
    "Loader",
    "TextData",
    "as_loader",
    "load",
    "load_text",
    "statistics",
    "synthetic",
]
