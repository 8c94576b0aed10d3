"""ResNet-18 and ResNet-34 for small images: the widths and blocks of He et al. for ImageNet (arXiv 1512.03385), a 3x3 stem, no pool."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from delock.nets.resnet import BasicBlock, he
from delock.nets.split import Group


class ProjectionBlock(BasicBlock):
    """A basic block whose shortcut, where the shape changes, is the paper's option B: bn(conv1x1(x)), with the block's stride."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__(width_in, width, stride)
        project = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.downsample = project if stride > 1 or width_in != width else None

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.downsample is None else self.downsample(x)


def resnet18(*blocks: int, classes: int, in_channels: int) -> nn.Sequential:
    """Groups of so many blocks, 64, 128, 256 and 512 channels wide: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34.

    (B, in_channels, H, W) -> (B, classes). The last is the network of interlocking backpropagation's CIFAR-10 example.
    Parameters have the names of torchvision's networks; only the stem's have another shape.
    """
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False),
        "bn1": nn.BatchNorm2d(64),
        "relu": nn.ReLU(),  # not in place: as an atom it may be the first of a stage, and would write on a received message
    }
    width_in = 64
    for i, count in enumerate(blocks):
        width = 64 * 2**i
        first = ProjectionBlock(width_in, width, 1 if i == 0 else 2)
        layers[f"layer{i + 1}"] = Group(first, *(ProjectionBlock(width, width, 1) for _ in range(count - 1)))
        width_in = width
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(1), "fc": nn.Linear(width_in, classes)}
    return he(nn.Sequential(OrderedDict(layers)))
