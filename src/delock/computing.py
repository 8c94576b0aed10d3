"""How a stage computes: the layout of images in memory, and the precision of matrix products and convolutions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class Computing:
    """amp: bfloat16 by autocast, weights and optimizer in their own precision. channels_last: convolutions' weights and images so."""

    amp: bool = False
    channels_last: bool = False

    def prepared(self, module: nn.Module) -> nn.Module:
        """The module with its weights laid out."""
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def laid_out(self, tensor: Tensor) -> Tensor:
        """An input, images (B, C, H, W) laid out."""
        if self.channels_last and tensor.dim() == 4 and tensor.is_floating_point():
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """What forwards and losses are computed in."""
        return torch.autocast(device.type, torch.bfloat16) if self.amp else _NOTHING


PLAIN = Computing()
