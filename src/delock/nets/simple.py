"""Builds two small networks for experiments: a convolutional one with batch norm, and a multilayer perceptron."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from delock.nets.resnet import he


def cnn(*, classes: int, in_channels: int, dropout: float) -> nn.Sequential:
    """Returns five conv-BN-ReLU layers with 32 to 128 channels, two of them with stride 2, then global mean and a linear layer.

    It maps (B, in_channels, H, W) to (B, classes).
    """

    def layer(width_in: int, width: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        return _layer({"conv": conv, "bn": nn.BatchNorm2d(width)}, dropout)

    layers: dict[str, nn.Module] = {
        "conv1": layer(in_channels, 32, 1),
        "conv2": layer(32, 64, 2),
        "conv3": layer(64, 64, 1),
        "conv4": layer(64, 128, 2),
        "conv5": layer(128, 128, 1),
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(1),
        "fc": nn.Linear(128, classes),
    }
    return he(nn.Sequential(OrderedDict(layers)))


def mlp(*, classes: int, in_channels: int, image_size: int, dropout: float, width: int = 256) -> nn.Sequential:
    """Returns a perceptron of three hidden ReLU layers, each `width` wide.

    It maps (B, in_channels, image_size, image_size) to (B, classes).
    """
    layers: dict[str, nn.Module] = {
        "flatten": nn.Flatten(1),
        "hidden1": _layer({"linear": nn.Linear(in_channels * image_size**2, width)}, dropout),
        "hidden2": _layer({"linear": nn.Linear(width, width)}, dropout),
        "hidden3": _layer({"linear": nn.Linear(width, width)}, dropout),
        "fc": nn.Linear(width, classes),
    }
    return he(nn.Sequential(OrderedDict(layers)))


def _layer(parts: dict[str, nn.Module], dropout: float) -> nn.Sequential:
    """Returns one layer: the parts, a ReLU (in place: neither a linear map nor a norm needs its output again), and dropout if above 0."""
    drop: dict[str, nn.Module] = {"dropout": nn.Dropout(dropout)} if dropout else {}
    return nn.Sequential(OrderedDict({**parts, "relu": nn.ReLU(inplace=True), **drop}))
