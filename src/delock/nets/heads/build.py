"""Builds heads by name: the table HEADS, conv strings, and `build_head`, whose initial weights are a function of its arguments alone.

cnn, mlp and mlp-sr are the auxiliary networks of decoupled greedy learning (Belilovsky, Eickenberg, Oyallon, arXiv 2106.06401);
conv strings name the heads of interlocking backpropagation's image networks (Gomez et al., arXiv 2010.04116).
"""

from __future__ import annotations

import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import nn

from delock.errors import UsageError
from delock.nets.heads.pooling import TokenMean
from delock.nets.resnet import he

Shape: TypeAlias = tuple[int, ...]  # of one sample: without the batch

CONV_STRING = re.compile(r"(conv[1-9][0-9]*-(bn-)?)+pool-fc")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EXAMPLE = "conv128-bn-conv64-bn-pool-fc"
AXES: Mapping[int, str] = MappingProxyType({4: "volumes (C, D, H, W)", 3: "images (C, H, W)", 2: "sequences (T, C)", 1: "vectors (C,)"})


def build_head(name: str, shape: Sequence[int], classes: int, *, seed: int = 0) -> nn.Sequential:
    """Returns the head `name` on the CPU, float32, for a stage whose output has this shape; `shape` is that of one sample, without batch.

    (B, C, H, W) -> (B, classes):
      mlp-sr   average pool to a quarter of each side (rounded up); 3 x [Conv1x1 C -> C, no bias; BN; ReLU]; then as mlp
      mlp      average pool to a quarter of each side, then to 2 x 2; flatten; 3 x [Linear 4C -> 4C; BN; ReLU]; Linear(4C -> classes)
      cnn      2 x [Conv3x3 C -> C, pad 1, no bias; BN; ReLU] at full size; average pool to 2 x 2; BN; flatten; Linear(4C -> classes)
      conv128-bn-conv64-bn-pool-fc, or any such string: convN is a Conv3x3 to N channels (pad 1, bias), bn an optional BN after it; a
               ReLU follows each, which the string does not name; pool is the mean over the image, fc the Linear to the classes
      pixels   -> (B, classes, H, W): Conv1x1 C -> C, no bias; GroupNorm over all channels; ReLU; Conv1x1; also on (B, C, T) and volumes
    (B, T, C) -> (B, T, classes):
      transformer   LayerNorm; Linear without bias, whose weight an embedding of the same stage can share
    (B, T, C) or (B, H, W, C) -> (B, classes):
      tokens   LayerNorm; the mean over all tokens, padding too; Linear
    (B, C, D, H, W) -> (B, classes):
      volume   the mean over the volume; Linear
    (B, C) -> (B, classes):
      linear

    A pool never enlarges an image, and treats each side by itself: a side of 1 pixel stays 1, and 4C becomes 2C or C.
    mlp-sr has 2C parameters fewer than in the code released with the paper, which registers one BN(C) that it never uses.

    seed: give every stage its own, `keys.key(seed, "head", k)`; initial weights depend on the arguments alone, and the global random state
    is neither read nor changed.
    Raises UsageError for an unknown name, a head that does not fit the shape, and sizes below 1.
    """
    shape = tuple(shape)
    layers = _layers(name, shape)
    if min(*shape, classes) < 1:
        raise UsageError(f"a head needs sizes of at least 1, not an output of shape {shape} and {classes} classes")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        return layers(shape, classes)


def choose(shape: Sequence[int]) -> str:
    """Returns the name of the default head for an output of this shape, without the batch: mlp-sr, transformer, linear or volume.

    It is chosen by the number of axes alone; `fitting` knows what the loss takes, too. Raises UsageError if no head fits.
    """
    return _fitting(tuple(shape))[0]


def mlp_layers(shape: Shape, classes: int, depth: int) -> dict[str, nn.Module]:
    """Returns the layers of an mlp for (B, C, H, W): average pool to at most 2 x 2, flatten, `depth` times Linear-BN-ReLU, Linear.

    Hidden layers are as wide as the flattened pool.
    """
    channels, *sides = shape
    fine = _at_most_2(sides)
    width = channels * math.prod(fine)
    hidden = {f"hidden{i}": _active(nn.Linear(width, width), nn.BatchNorm1d(width)) for i in range(1, depth + 1)}
    return {"pool": nn.AdaptiveAvgPool2d(fine), "flatten": nn.Flatten(1), **hidden, "fc": nn.Linear(width, classes)}


def quarter(shape: Shape) -> Shape:
    """Returns (C, H / 4, W / 4), rounded up: the shape to which mlp and mlp-sr pool first."""
    channels, *sides = shape
    return (channels, *(math.ceil(side / 4) for side in sides))


def _mlp(shape: Shape, classes: int) -> nn.Sequential:
    small = quarter(shape)
    return _he(coarse=nn.AdaptiveAvgPool2d(small[1:]), **mlp_layers(small, classes, depth=3))


def _mlp_sr(shape: Shape, classes: int) -> nn.Sequential:
    small = quarter(shape)
    convs = _convs(shape[0], 3, kernel=1)
    return _he(coarse=nn.AdaptiveAvgPool2d(small[1:]), **convs, **mlp_layers(small, classes, depth=3))


def _cnn(shape: Shape, classes: int) -> nn.Sequential:
    channels, *sides = shape
    fine = _at_most_2(sides)
    rest = {"pool": nn.AdaptiveAvgPool2d(fine), "bn": nn.BatchNorm2d(channels), "flatten": nn.Flatten(1)}
    return _he(**_convs(channels, 2, kernel=3), **rest, fc=nn.Linear(channels * math.prod(fine), classes))


def _transformer(shape: Shape, classes: int) -> nn.Sequential:
    width = shape[-1]
    fc = nn.Linear(width, classes, bias=False)
    nn.init.normal_(fc.weight, std=0.02)  # GPT-2's: the first predictions are nearly uniform
    return nn.Sequential(OrderedDict(norm=nn.LayerNorm(width), fc=fc))


def _linear(shape: Shape, classes: int) -> nn.Sequential:
    return _he(fc=nn.Linear(shape[0], classes))


def _tokens(shape: Shape, classes: int) -> nn.Sequential:
    width = shape[-1]
    return _he(norm=nn.LayerNorm(width), pool=TokenMean(), fc=nn.Linear(width, classes))


def _pixels(shape: Shape, classes: int) -> nn.Sequential:
    channels, conv = shape[0], CONVS[len(shape) - 2]
    norm = nn.GroupNorm(1, channels)  # no batch statistics: it takes a single sample, too
    return _he(conv=nn.Sequential(conv(channels, channels, 1, bias=False), norm, nn.ReLU(inplace=True)), fc=conv(channels, classes, 1))


def _volume(shape: Shape, classes: int) -> nn.Sequential:
    return _he(pool=nn.AdaptiveAvgPool3d(1), flatten=nn.Flatten(1), fc=nn.Linear(shape[0], classes))


# name: numbers of axes of the outputs it takes, builder; the first of a kind is the default
HEADS: Mapping[str, tuple[Sequence[int], Callable[[Shape, int], nn.Sequential]]] = MappingProxyType(
    {
        "mlp-sr": ((3,), _mlp_sr),
        "mlp": ((3,), _mlp),
        "cnn": ((3,), _cnn),
        "transformer": ((2,), _transformer),
        "linear": ((1,), _linear),
        "volume": ((4,), _volume),
        "tokens": ((2, 3), _tokens),
        "pixels": ((2, 3, 4), _pixels),
    }
)


def _conv_string(string: str) -> Callable[[Shape, int], nn.Sequential]:
    def layers(shape: Shape, classes: int) -> nn.Sequential:
        channels = shape[0]
        made: dict[str, nn.Module] = {}
        for i, (number, norm) in enumerate(re.findall(r"conv(\d+)-(bn-)?", string), 1):
            conv = nn.Conv2d(channels, channels := int(number), 3, padding=1)
            made[f"conv{i}"] = _active(conv, nn.BatchNorm2d(channels) if norm else None)
        return _he(**made, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1), fc=nn.Linear(channels, classes))

    return layers


def _layers(name: str, shape: Shape) -> Callable[[Shape, int], nn.Sequential]:
    axes: Sequence[int]
    if CONV_STRING.fullmatch(name):
        axes, layers = (3,), _conv_string(name)
    elif name in HEADS:
        axes, layers = HEADS[name]
    else:
        near = " or ".join(map(repr, difflib.get_close_matches(name, [*HEADS, EXAMPLE])))
        hint = f"did you mean {near}? " if near else ""
        raise UsageError(f"no head is called {name!r}: {hint}there are {', '.join(HEADS)}, and strings like {EXAMPLE}")
    if len(shape) not in axes:
        takes, fits = " or ".join(AXES[one] for one in axes), " or ".join(_fitting(shape))
        raise UsageError(f"head {name} takes {takes} and does not fit a stage whose output has the shape {shape}: use {fits}")
    return layers


def _fitting(shape: Shape) -> list[str]:
    names = [name for name, (axes, _) in HEADS.items() if len(shape) in axes]
    if not names:
        raise UsageError(
            f"no head fits a stage whose output has the shape {shape}, without the batch: there are heads for "
            f"{', '.join(AXES.values())}; cut elsewhere, or give a head of your own"
        )
    return [*names, EXAMPLE] if len(shape) == 3 else names


def _convs(channels: int, count: int, kernel: int) -> dict[str, nn.Module]:
    def conv() -> nn.Module:
        return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)

    return {f"conv{i}": _active(conv(), nn.BatchNorm2d(channels)) for i in range(1, count + 1)}


def _active(layer: nn.Module, norm: nn.Module | None) -> nn.Sequential:
    """Returns layer, norm if given, and ReLU (in place: neither a linear map nor a norm needs its output again)."""
    return nn.Sequential(layer, *([norm] if norm else []), nn.ReLU(inplace=True))


def _at_most_2(sides: Sequence[int]) -> Shape:
    return tuple(min(2, side) for side in sides)


def _he(**layers: nn.Module) -> nn.Sequential:
    return he(nn.Sequential(OrderedDict(layers)))
