"""Defines the four networks, with their layouts and precisions, the same for every contender."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock.nets import build, gpt, nats
from delock.nets.resnet import he
from delock.options import Execution

READY, CLASSES, LETTERS = 4, 10, 65  # batches that are made before the clock starts; classes of images and vectors, of letters
ENDLESS = 1 << 30  # batches in an epoch of them
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Work:
    """Holds a network, its loss, and batches of its inputs."""

    title: str
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]  # of a batch of inputs
    letters: bool = False  # inputs and targets are letters; else random numbers and a class per sample

    def batches(self) -> list[Batch]:
        """Returns READY batches, the same in every process."""
        generator = torch.Generator().manual_seed(0)
        if self.letters:
            return [(_whole(LETTERS, self.shape, generator), _whole(LETTERS, self.shape, generator)) for _ in range(READY)]
        sizes = self.shape, self.shape[:1]
        return [(torch.randn(sizes[0], generator=generator), _whole(CLASSES, sizes[1], generator)) for _ in range(READY)]


class Ready:
    """Loads batches that are ready, again and again: the cost of a data set is not measured."""

    def __init__(self, made: list[Batch]) -> None:
        self.made = made

    def __len__(self) -> int:
        return ENDLESS

    def sizes(self) -> list[int]:
        """Returns the rows of the batches, once each."""
        return [len(x) for x, _ in self.made]

    def epoch(self, e: int) -> Iterator[Batch]:
        """Yields the same batches in every epoch."""
        for i in range(ENDLESS):
            yield self.made[i % len(self.made)]


def _whole(below: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(below, shape, generator=generator)


def _seeded(make: Callable[[], nn.Sequential]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return he(make())


def convolutions(depth: int = 8, width: int = 48) -> nn.Module:
    """Returns `depth` times convolution, GroupNorm and ReLU at full size; mean over the image; linear: (B, 3, H, W) -> (B, CLASSES)."""

    def make() -> nn.Sequential:
        layers: dict[str, nn.Module] = {}
        for i in range(depth):
            convolution = nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False)
            layers[f"conv{i}"] = nn.Sequential(convolution, nn.GroupNorm(8, width), nn.ReLU())
        return nn.Sequential(OrderedDict(layers, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1), fc=nn.Linear(width, CLASSES)))

    return _seeded(make)


def perceptron(depth: int = 8, width: int = 1024) -> nn.Module:
    """Returns `depth` times linear and ReLU, and a linear classifier: (B, width) -> (B, CLASSES)."""

    def make() -> nn.Sequential:
        layers = {f"hidden{i}": nn.Sequential(nn.Linear(width, width), nn.ReLU()) for i in range(depth)}
        return nn.Sequential(OrderedDict(layers, fc=nn.Linear(width, CLASSES)))

    return _seeded(make)


WORKS: Mapping[str, Work] = MappingProxyType(
    {
        "resnet20": Work(
            "ResNet-20, batch 128",
            partial(build, "resnet20", classes=CLASSES, in_channels=3, image_size=32),
            cross_entropy,
            (128, 3, 32, 32),
        ),
        "conv": Work("8 x [conv 3x3, 48 channels, GroupNorm, ReLU], batch 64", convolutions, cross_entropy, (64, 3, 32, 32)),
        "mlp": Work("8 x [linear 1024, ReLU], batch 512", perceptron, cross_entropy, (512, 1024)),
        "gpt": Work(
            "GPT, 6 layers, width 256, context 256, batch 16",
            partial(gpt, LETTERS, depth=6, width=256, heads=4, context=256),
            nats,
            (16, 256),
            letters=True,
        ),
    }
)
CONFIGURATIONS: Mapping[str, Execution] = MappingProxyType(
    {
        "default": Execution(),
        "channels-last": Execution(layout="channels-last"),
        "bf16": Execution(amp="bf16"),
        "channels-last-bf16": Execution(amp="bf16", layout="channels-last"),
    }
)


def pays(work: Work, execution: Execution) -> bool:
    """Returns False for a layout that changes nothing: channels last, for a network that does not take images."""
    return execution.layout == "default" or len(work.shape) == 4
