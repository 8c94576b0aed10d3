"""Plain convolutional networks for small images: VGG (Simonyan, Zisserman, arXiv 1409.1556), and the one of DGL's buffer study."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from delock.nets.heads.build import mlp_layers, quarter
from delock.nets.resnet import he


def vgg(*layers: int, classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """Five runs of so many conv3x3-BN-ReLU layers, 64, 128, 256, 512 and 512 channels wide, a max pool behind each; mean; one linear.

    (B, in_channels, image_size, image_size) -> (B, classes). (1, 1, 2, 2, 2) is VGG-11 and (2, 2, 4, 4, 4) VGG-19, whose names count
    the paper's three linear layers. Pools stop where nothing is left to pool. No bias before a batch norm.
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
    """Six conv3x3-BN-ReLU layers, twice `width`, twice 2 `width`, twice 4 `width`, a max pool before each change of width; an mlp head.

    (B, in_channels, image_size, image_size) -> (B, classes). Of decoupled greedy learning (arXiv 2106.06401), where width is 128: its
    sides are 32, 32, 16, 16, 8, 8 on CIFAR. The network's own head has two hidden layers, as in the code released with the paper
    (auxiliary ones have three). One conv layer per stage, as there: cuts at conv2, pool1, conv4, pool2, conv6.
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
    """One atom; ReLU in place, as a norm does not need its output again."""
    conv = nn.Conv2d(width_in, width, 3, 1, 1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width), relu=nn.ReLU(inplace=True)))


def _pool(made: dict[str, nn.Module], number: int, side: int) -> int:
    """Adds a pool, an atom of its own (a cut beside it chooses the side of the head), and gives the side behind it."""
    if side > 1:
        made[f"pool{number}"] = nn.MaxPool2d(2)
    return max(1, side // 2)
