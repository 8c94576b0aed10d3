"""Builds networks by name: the table MODELS, and `build`, whose initial weights are a function of its arguments alone."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from delock.errors import UsageError
from delock.nets.resnet import resnet, resnet18
from delock.nets.simple import cnn, mlp
from delock.nets.vgg import dgl_cnn6, vgg
from delock.nets.wrn import wrn

TORCHVISION = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)


def _torchvision(name: str, *, classes: int, in_channels: int) -> nn.Module:
    from torchvision.models import get_model  # here: importing it takes about a second, and no other model needs it

    model: nn.Module = get_model(name, weights=None, num_classes=classes)
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    return model


# a builder names, of classes, in_channels, image_size and dropout, what its network depends on
MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        **{f"resnet{6 * n + 2}": partial(resnet, n) for n in (1, 3, 5, 7, 9, 18, 200)},
        "resnet32-half": partial(resnet, 5, width=8),
        "resnet18-cifar": partial(resnet18, 2, 2, 2, 2),
        "resnet34-cifar": partial(resnet18, 3, 4, 6, 3),
        "wrn-16-4": partial(wrn, 16, 4),
        "wrn-28-10": partial(wrn, 28, 10),
        "vgg11": partial(vgg, 1, 1, 2, 2, 2),
        "vgg19": partial(vgg, 2, 2, 4, 4, 4),
        "dgl-cnn6": partial(dgl_cnn6, 128),
        "dgl-cnn6-quarter": partial(dgl_cnn6, 32),
        "cnn": cnn,
        "mlp": mlp,
        **{f"torchvision/{name}": partial(_torchvision, name) for name in TORCHVISION},
    }
)


def build(name: str, *, classes: int, in_channels: int, image_size: int, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """Returns the network `name` (a key of MODELS) on the CPU.

    It maps (B, in_channels, image_size, image_size) float32 to logits (B, classes).
    Initial weights depend on the arguments alone; the global random state is neither read nor changed.
    Raises UsageError for an unknown name, sizes below 1, dropout outside [0, 1), and dropout above 0 for a network that has none.
    """
    builder = _builder(name)
    if min(classes, in_channels, image_size) < 1:
        raise UsageError(f"classes ({classes}), in_channels ({in_channels}) and image_size ({image_size}) must be at least 1")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout is a probability below 1, not {dropout}")
    if dropout and "dropout" not in _takes(builder):
        having = ", ".join(other for other in MODELS if "dropout" in _takes(MODELS[other]))
        raise UsageError(f"{name} has no dropout: set it to 0, or use one of {having}")
    given = {"classes": classes, "in_channels": in_channels, "image_size": image_size, "dropout": dropout}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        return builder(**{k: v for k, v in given.items() if k in _takes(builder)})


def _takes(builder: Callable[..., nn.Module]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(builder).parameters


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in MODELS:
        return MODELS[name]
    near = " or ".join(map(repr, difflib.get_close_matches(name, MODELS)))
    raise UsageError(f"no model is called {name!r}: " + (f"did you mean {near}?" if near else f"there are {', '.join(MODELS)}"))
