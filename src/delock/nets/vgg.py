"""Builds plain convolutional networks for small images: VGG (Simonyan, Zisserman, arXiv 1409.1556) and the CNN of DGL's buffer study."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from delock.nets.heads.build import mlp_layers, quarter
from delock.nets.resnet import he


def vgg(*layers: int, classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """Returns five runs of layers[i] conv3x3-BN-ReLU layers, 64, 128, 256, 512, 512 channels wide, then global mean and a linear layer.

    It maps (B, in_channels, image_size, image_size) to (B, classes). (1, 1, 2, 2, 2) is VGG-11 and (2, 2, 4, 4, 4) VGG-19; the names count
    the paper's three linear layers, where this network has one. A max pool follows each run, as long as an image has more than one pixel.
    Convolutions have no bias, because a batch norm follows.
    """
    made: dict[str, nn.Module] = {}
    width_in, side = in_channels, image_size
    for i, (count, width) in enumerate(zip(layers, (64, 128, 256, 512, 512), strict=True), 1):
        for j in range(1, count + 1):
            made[f"conv{i}_{j}"] = _layer(width_in, width)
            width_in = width
        side = _pool(made, i, side)
    made |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(1), "fc": nn.Linear(width_in, classes)}
    return he(nn.Sequential(OrderedDict(made)))


def dgl_cnn6(width: int, *, classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """Returns six conv3x3-BN-ReLU layers with an mlp head: two each of `width`, 2 `width` and 4 `width` channels, max pools between.

    It maps (B, in_channels, image_size, image_size) to (B, classes). Source: decoupled greedy learning (arXiv 2106.06401), where `width` is
    128 and the sides of the images are 32, 32, 16, 16, 8, 8 on CIFAR. The network's own head has two hidden layers, as in the code released
    with the paper; auxiliary heads have three. For one conv layer per stage, as in the paper, cut at conv2, pool1, conv4, pool2, conv6.
    """
    made: dict[str, nn.Module] = {}
    width_in, side = in_channels, image_size
    for i in range(6):
        if i in (2, 4):
            side = _pool(made, i // 2, side)
        width_out = width * 2 ** (i // 2)
        made[f"conv{i + 1}"] = _layer(width_in, width_out)
        width_in = width_out
    small = quarter((width_in, side, side))
    made |= {"coarse": nn.AdaptiveAvgPool2d(small[1:]), **mlp_layers(small, classes, depth=2)}
    return he(nn.Sequential(OrderedDict(made)))


def _layer(width_in: int, width: int) -> nn.Sequential:
    """Returns conv, norm and ReLU as one layer; the ReLU works in place, because a norm does not need its output again."""
    conv = nn.Conv2d(width_in, width, 3, 1, 1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width), relu=nn.ReLU(inplace=True)))


def _pool(made: dict[str, nn.Module], number: int, side: int) -> int:
    """Adds a pool if the side is above 1, and returns the side after it.

    The pool is a layer of its own, so that a cut before or after it decides the size of the images that an auxiliary head gets.
    """
    if side > 1:
        made[f"pool{number}"] = nn.MaxPool2d(2)
    return max(1, side // 2)
