"""Layers of heads that torch has not as modules: a mean over tokens, a resize by fixed ratios, two axes exchanged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate

MODES = ("linear", "bilinear", "trilinear")


class TokenMean(nn.Module):
    """Takes the mean over all axes between samples and channels: (B, ..., C) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


class Resize(nn.Module):
    """Resizes the sides of (B, C, ...) by fixed ratios, linearly; the new sides are rounded."""

    def __init__(self, ratios: Sequence[float]) -> None:
        super().__init__()
        self.ratios = tuple(ratios)

    def forward(self, x: Tensor) -> Tensor:
        sides = [max(1, round(ratio * side)) for ratio, side in zip(self.ratios, x.shape[2:], strict=True)]
        return interpolate(x, size=sides, mode=MODES[len(sides) - 1], align_corners=False)

    def extra_repr(self) -> str:
        return ", ".join(f"{ratio:g}" for ratio in self.ratios)


class Transpose(nn.Module):
    """Exchanges the last two axes: (B, T, C) -> (B, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
