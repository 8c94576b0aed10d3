"""Builds ResNets for small images, of depth 6n + 2 (He et al., arXiv 1512.03385, section 4.2) and as ResNet-18 and ResNet-34."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from delock.nets.group import Group


class BasicBlock(nn.Module):
    """Computes relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)).

    It maps (B, width_in, H, W) to (B, width, ceil(H / stride), ceil(W / stride)). The shortcut is the paper's option A, without
    parameters: if the shape changes, it takes every second pixel and adds channels of zeros, half of them before the old channels and half
    after.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.new = stride, width - width_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # in place: both ReLUs write into tensors made here, which no backward needs (batch norm keeps its input, a sum keeps nothing)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (B, width, H', W')
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 1 and self.new == 0:
            return x
        before = self.new // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new - before))


def resnet(n: int, *, classes: int, in_channels: int, width: int = 16) -> nn.Sequential:
    """Returns ResNet-(6n + 2): three groups of n blocks with `width`, 2 `width` and 4 `width` channels.

    It maps (B, in_channels, H, W) to (B, classes).
    """

    def group(before: int, after: int, stride: int) -> Group:
        return Group(BasicBlock(before, after, stride), *(BasicBlock(after, after, 1) for _ in range(n - 1)))

    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(in_channels, width, 3, 1, 1, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),  # not in place: it may be the first layer of a stage, and would write into a received message
        "layer1": group(width, width, 1),
        "layer2": group(width, 2 * width, 2),
        "layer3": group(2 * width, 4 * width, 2),
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(1),
        "fc": nn.Linear(4 * width, classes),
    }
    return he(nn.Sequential(OrderedDict(layers)))


def he(model: nn.Sequential) -> nn.Sequential:
    """Initializes a model in place with He's normal weights, variance 2 / fan_out (convolutions) or 2 / fan_in (linear), and biases 0.

    Source: He et al., arXiv 1502.01852.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if isinstance(module, nn.Conv2d) else "fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class ProjectionBlock(BasicBlock):
    """Replaces the shortcut by the paper's option B where the shape changes: bn(conv1x1(x)), with the block's stride."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__(width_in, width, stride)
        project = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.downsample = project if stride > 1 or width_in != width else None

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.downsample is None else self.downsample(x)


def resnet18(*blocks: int, classes: int, in_channels: int) -> nn.Sequential:
    """Returns groups of blocks[i] blocks, 64, 128, 256, 512 channels wide: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34.

    It maps (B, in_channels, H, W) to (B, classes). ResNet-34 is the network of interlocking backpropagation's CIFAR-10 example.
    Parameters have the names of torchvision's networks; only the stem's have another shape.
    """
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False),
        "bn1": nn.BatchNorm2d(64),
        "relu": nn.ReLU(),  # not in place: it may be the first layer of a stage, and would write into a received message
    }
    width_in = 64
    for i, count in enumerate(blocks):
        width = 64 * 2**i
        first = ProjectionBlock(width_in, width, 1 if i == 0 else 2)
        layers[f"layer{i + 1}"] = Group(first, *(ProjectionBlock(width, width, 1) for _ in range(count - 1)))
        width_in = width
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(1), "fc": nn.Linear(width_in, classes)}
    return he(nn.Sequential(OrderedDict(layers)))
