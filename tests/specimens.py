"""A tiny model for the zoo, with the batches that it learns and its loss; pieces from which the families make theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

CLASSES = 5
WORDS = 40  # of the vocabulary; word 0 fills up short rows
SIZES = (4, 4, 3, 2, 4)
"""Samples of the training batches."""

SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
SLOW = partial(torch.optim.SGD, lr=0.001, momentum=0.9)
"""For networks whose batch norm sees two numbers of a channel where an image has shrunk to a pixel."""
ADAMW = partial(torch.optim.AdamW, lr=3e-3)


@dataclass(frozen=True, eq=False)
class Specimen:
    """A model of the zoo. `batch` draws (inputs, targets) of n samples, or a dict of forward's arguments where the model has its own loss.

    `line`: of a model that cannot be traced, the user's line that decides on a value. `exact`: False if its code computes in another way
    where it is traced, so that it is the same but for rounding.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[int, Generator], Any]
    loss: Callable[[Any, Any], Tensor] | None = cross_entropy
    options: Mapping[str, Any] = field(default_factory=dict)
    line: str = ""
    exact: bool = True

    def model(self) -> nn.Module:
        """Returns the model with the same weights every time, and without dropout."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = self.make()
        for one in made.modules():
            if isinstance(one, nn.modules.dropout._DropoutNd):
                one.p = 0.0
        return made

    def train(self) -> list[Any]:
        """Returns the training batches, the same every time."""
        g = Generator().manual_seed(1)
        return [self.batch(n, g) for n in SIZES]

    def test(self) -> list[Any]:
        """Returns the one batch of the test set."""
        return [self.batch(4, Generator().manual_seed(2))]

    def fit_options(self) -> dict[str, Any]:
        """Returns keywords of `fit`: the loss, the optimizer, and what else the model needs."""
        return {"loss": self.loss, "optimizer": SGD, **self.options}


# Batches --------------------------------------------------------------------------------------------------------------


def images(n: int, g: Generator, size: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Images with a class each."""
    return torch.randn(n, channels, size, size, generator=g), labels(n, g)


def scenes(n: int, g: Generator, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images with a class for every pixel, its brightness."""
    x = torch.randn(n, 3, size, size, generator=g)
    return x, (2 * x.mean(1) + CLASSES / 2).clamp(0, CLASSES - 1).long()


def vectors(n: int, g: Generator, width: int = 12) -> tuple[Tensor, Tensor]:
    """Vectors with a class each."""
    return torch.randn(n, width, generator=g), labels(n, g)


def labels(n: int, g: Generator) -> Tensor:
    return torch.randint(CLASSES, (n,), generator=g)


def words(n: int, g: Generator, length: int) -> Tensor:
    """Rows of words, none of them 0."""
    return torch.randint(1, WORDS, (n, length), generator=g)


def text(n: int, g: Generator, length: int = 0) -> dict[str, Tensor]:
    """Rows for a model that shifts its labels itself; batches of other sizes have rows of other lengths, unless a length is given."""
    ids = words(n, g, length or 5 + 2 * n)
    return {"input_ids": ids, "labels": ids}


def padded(n: int, g: Generator) -> dict[str, Tensor]:
    """Rows of several lengths under a mask, the first as long as the batch; nothing is learned at what fills them up."""
    ids = words(n, g, 6 + n)
    lengths = torch.cat([torch.tensor([6 + n]), torch.randint(3, 6 + n, (n - 1,), generator=g)])
    mask = (torch.arange(6 + n) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def unpadded(n: int, g: Generator) -> dict[str, Tensor]:
    """Rows of one length under a mask of ones, as tokenizers give them."""
    batch = text(n, g)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def at_times_padded(n: int, g: Generator) -> dict[str, Tensor]:
    """Batches of which some are padded, the first is not."""
    return unpadded(n, g) if n == 4 else padded(n, g)


def sorted_by_kind(n: int, g: Generator) -> dict[str, Tensor]:
    """Padded rows with a class each."""
    return {**padded(n, g), "labels": labels(n, g)}


# Losses ---------------------------------------------------------------------------------------------------------------


def per_word(out: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (B, T, words) and (B, T)."""
    return cross_entropy(out.flatten(0, 1), targets.flatten())


def of_logits(out: Any, targets: Tensor) -> Tensor:
    """Loss of a model of transformers, which gives an output with logits, and of a head, which gives a tensor: per row or per word."""
    logits = out if isinstance(out, Tensor) else out["logits"]
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


def with_auxiliary(out: Any, targets: Tensor) -> Tensor:
    """Loss of a network that gives (logits, auxiliary logits, ...) in training, and logits alone in evaluation."""
    if isinstance(out, Tensor):
        return cross_entropy(out, targets)
    first, *others = (one for one in out if one is not None)
    return cross_entropy(first, targets) + 0.3 * sum((cross_entropy(one, targets) for one in others), torch.zeros(()))


def of_scenes(out: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Loss of a segmentation network, which gives a dict."""
    loss = cross_entropy(out["out"], targets)
    return loss + 0.5 * cross_entropy(out["aux"], targets) if "aux" in out else loss
