"""How a stage computes: layout of images, precision of products and convolutions, a batch whole or in slices, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Tree: TypeAlias = Any  # a tensor or a tuple of tensors
_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class Execution:
    """amp: bfloat16 by autocast, weights and optimizer in their own precision. channels_last: convolutions' weights and images so.

    chunks: a batch goes through a stage in so many slices, each of which may stay in the cache from layer to layer. Gradients are those
    of the whole batch but for rounding; batch norm takes its statistics over a slice, as GPipe does. compile: by torch.compile.
    """

    amp: bool = False
    channels_last: bool = False
    chunks: int = 1
    compile: bool = False

    def prepared(self, module: nn.Module) -> nn.Module:
        """The module with its weights laid out."""
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def laid_out(self, tensor: Tensor) -> Tensor:
        """An input, images (B, C, H, W) laid out; compiled code is for given strides, so all inputs of a shape get the same."""
        images = self.channels_last and tensor.dim() == 4 and tensor.is_floating_point()
        form = torch.channels_last if images else torch.contiguous_format
        if self.compile:  # contiguous() leaves the strides of dimensions of size 1 as they are
            made = torch.empty_like(tensor, memory_format=form)
            return tensor if tensor.stride() == made.stride() else made.copy_(tensor)
        return tensor.contiguous(memory_format=form) if images else tensor

    def apply(self, module: Callable[[Tree], Tree], given: Tree, device: torch.device) -> Tree:
        """module(given), a tensor or a tuple of tensors."""
        with self.context(device):
            rows = len(given if isinstance(given, Tensor) else given[0])
            if self.chunks == 1 or rows < 2:
                return module(given)
            edges = [rows * i // self.chunks for i in range(self.chunks + 1)]
            return _joined([module(_slice(given, a, b, rows)) for a, b in pairwise(edges) if a < b])

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """What forwards and losses are computed in."""
        return torch.autocast(device.type, torch.bfloat16) if self.amp else _NOTHING


def _slice(given: Tree, a: int, b: int, rows: int) -> Tree:
    """Rows a to b of every tensor that has one per sample, in memory of their own, because modules write in place; others whole."""
    if isinstance(given, Tensor):
        return given[a:b].clone()
    return tuple(t[a:b].clone() if t.dim() and len(t) == rows else t for t in given)


def _joined(parts: list[Tree]) -> Tree:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(own) if own[0].dim() else own[0] for own in zip(*parts, strict=True))


PLAIN = Execution()
