"""Builds wide residual networks WRN-depth-widen (Zagoruyko, Komodakis, arXiv 1605.07146): pre-activation, dropout inside the block."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from delock.nets.group import Group
from delock.nets.resnet import he


class WideBlock(nn.Module):
    """Computes x + conv(drop(relu(bn(conv(relu(bn(x))))))); if the shape changes, the shortcut is a 1x1 convolution of relu(bn(x)).

    It maps (B, width_in, H, W) to (B, width, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, width_in: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()  # no dropout module: nothing to seed
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changed = stride > 1 or width_in != width
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if changed else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # in place on the batch norms' outputs, which no backward needs; the block's own input is never written into
        active = F.relu(self.bn1(x), inplace=True)  # (B, width_in, H, W)
        out = F.relu(self.bn2(self.conv1(active)), inplace=True)  # (B, width, H', W')
        change: torch.Tensor = self.conv2(self.drop(out))
        return change + (x if self.shortcut is None else self.shortcut(active))


def wrn(depth: int, widen: int, *, classes: int, in_channels: int, dropout: float) -> nn.Sequential:
    """Returns WRN-depth-widen, depth = 6n + 4: three groups of n blocks with 16, 32 and 64 times `widen` channels.

    It maps (B, in_channels, H, W) to (B, classes).
    """
    n = (depth - 4) // 6
    a, b, c = 16 * widen, 32 * widen, 64 * widen

    def group(width_in: int, width: int, stride: int) -> Group:
        return Group(WideBlock(width_in, width, stride, dropout), *(WideBlock(width, width, 1, dropout) for _ in range(n - 1)))

    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False),
        "layer1": group(16, a, 1),
        "layer2": group(a, b, 2),
        "layer3": group(b, c, 2),
        "bn": nn.BatchNorm2d(c),
        "relu": nn.ReLU(),  # not in place: it may be the first layer of a stage, and would write into a received message
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(1),
        "fc": nn.Linear(c, classes),
    }
    return he(nn.Sequential(OrderedDict(layers)))
