"""Applies an Execution to a module: memory format of weights and images, precision, a batch in chunks. Calls a loss, and refuses misfits.

These functions are all that the stages, and the measurement of layers before a run, know of how a module computes. Compiling and
capturing change more than one call, and are read where they happen (`stage.compiled`, `engine.graphs`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from delock.errors import DelockError, UsageError
from delock.options import Execution
from delock.tensors import Value, floating, kind, like, shown, tensors

Loss = Callable[[Any, Any], Tensor]

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


# ---- the loss ----------------------------------------------------------------------------------------------------------------------


def module_of(loss: Loss | None) -> nn.Module | None:
    """Returns the loss that the user gave, if it is a module; also one behind what has it as `func`, as a partial does."""
    given: Any = loss
    while not isinstance(given, nn.Module) and hasattr(given, "func"):
        given = given.func
    return given if isinstance(given, nn.Module) else None


def compute_loss(loss: Loss, outputs: Any, targets: Any) -> Tensor:
    """Returns loss(outputs, targets), with a gradient if the outputs have one. Raises UsageError for a result that is no loss.

    What the loss itself raises comes out as it is, with a note that shows what the loss was given.
    """
    try:
        found = loss(outputs, targets)
    except (torch.OutOfMemoryError, DelockError):
        raise
    except Exception as error:
        error.add_note(given(outputs, targets))
        raise
    _refuse(found, outputs)
    return found


def given(outputs: Any, targets: Any) -> str:
    """Returns what a loss was called with, in words."""
    return f"loss(outputs, targets) was called with outputs {shown(outputs)} and targets {shown(targets, values=True)}"


def _refuse(found: Any, outputs: Any) -> None:
    """Raises UsageError for a result that no gradient can be taken of."""
    must = "the loss must be one number for a batch, a tensor computed from the outputs, but loss(outputs, targets) returned"
    if not isinstance(found, Tensor):
        raise UsageError(f"{must} {kind(found)}: {_remedy(found)}")
    if found.numel() != 1:
        raise UsageError(f"{must} a tensor of shape {tuple(found.shape)}: take its mean")
    if found.is_complex():
        raise UsageError(f"{must} a complex number ({shown(found)}): take its real part or its absolute value")
    values = outputs if isinstance(outputs, Tensor | tuple) else ()
    if any(h.requires_grad for h in floating(values)) and not found.requires_grad:
        why = "" if found.is_floating_point() else f", and a tensor of dtype {shown(found).split()[-1]} has no gradient"
        raise UsageError(
            f"the loss cannot be differentiated{why}: compute it from the outputs by torch's own functions, without detach, item or no_grad"
        )


def _remedy(found: object) -> str:
    if isinstance(found, bool | int | float | complex):
        return "return the tensor itself, without item() or float()"
    return "return the one that is to be differentiated" if isinstance(found, tuple | list | dict) else "return the loss"
