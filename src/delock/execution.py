"""Applies an Execution to a module: memory format of weights and images, precision, a batch in chunks.

These functions are all that the stages, and the measurement of layers before a run, know of how a module computes. Compiling and
capturing change more than one call, and are read where they happen (`stage.compiled`, `engine.graphs`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn

from delock.options import Execution
from delock.tensors import Value, like, tensors

PLAIN = Execution()
_NOTHING = nullcontext()


def lay_out_weights(execution: Execution, module: nn.Module) -> nn.Module:
    """Returns the module with its weights in the memory format that is asked for."""
    return module.to(memory_format=torch.channels_last) if execution.layout == "channels-last" else module


class Modes:
    """Puts a module into training mode, but for what stays in eval mode: what was so beside a whole that was not.

    whole: the model that the module is a part of was in training mode; by default asked of the module.
    """

    def __init__(self, module: nn.Module, whole: bool | None = None) -> None:
        self.module = module
        self.fixed = [one for one in module.modules() if not one.training] if (module.training if whole is None else whole) else []

    def train(self) -> None:
        """Puts it into training mode."""
        self.module.train()
        for one in self.fixed:
            one.training = False


def lay_out_input(execution: Execution, tensor: Tensor) -> Tensor:
    """Returns an input, images (B, C, H, W) in the memory format that is asked for.

    Compiled code is made for given strides, so all inputs of a shape get the same ones.
    """
    images = execution.layout == "channels-last" and tensor.dim() == 4 and tensor.is_floating_point()
    form = torch.channels_last if images else torch.contiguous_format
    if execution.compile:  # contiguous() leaves the strides of dimensions of size 1 as they are
        made = torch.empty_like(tensor, memory_format=form)
        return tensor if tensor.stride() == made.stride() else made.copy_(tensor)
    return tensor.contiguous(memory_format=form) if images else tensor


def apply(execution: Execution, module: Callable[[Value], Value], given: Value, device: torch.device) -> Value:
    """Returns module(given), computed in the precision and the chunks that are asked for.

    Gradients are those of the whole batch but for rounding; batch norm takes its statistics over a chunk, as GPipe does.
    """
    with precision(execution, device):
        if execution.chunks == 1 or (rows := len(tensors(given)[0])) < 2:
            return module(given)
        count = min(execution.chunks, rows)
        edges = [rows * i // count for i in range(count + 1)]
        return _joined([module(_slice(given, a, b, rows)) for a, b in pairwise(edges)])


def precision(execution: Execution, device: torch.device) -> AbstractContextManager[object]:
    """Returns the context in which forwards and losses are computed."""
    return torch.autocast(device.type, torch.bfloat16) if execution.amp == "bf16" else _NOTHING


def _slice(given: Value, a: int, b: int, rows: int) -> Value:
    """Returns rows a to b of every tensor that has one per sample, copied, because modules write in place; other tensors stay whole."""
    return like(given, [t[a:b].clone() if t.dim() and len(t) == rows else t for t in tensors(given)])


def _joined(chunks: list[Value]) -> Value:
    """Returns the outputs of all chunks as one. Of a tensor without rows in a tuple, such as a scale, the first chunk's is taken."""
    columns = list(zip(*map(tensors, chunks), strict=True))
    return like(chunks[0], [torch.cat(own) if own[0].dim() or len(columns) == 1 else own[0] for own in columns])
