"""Counts the multiply-adds and parameters of a head and of its stage.

Decoupled greedy learning keeps the multiply-adds of a head to about 5 % of its stage's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from delock.errors import UsageError
from delock.tensors import Value, map_tensors, tensors


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Compares a head with its stage, the head itself left out."""

    head_flops: int  # multiply-adds of the forward of one sample
    stage_flops: int  # the same
    head_params: int  # number of parameters
    stage_params: int  # the same

    @property
    def flops(self) -> float:
        """Returns the head's multiply-adds divided by the stage's; infinite if the stage has none."""
        return self.head_flops / self.stage_flops if self.stage_flops else math.inf

    @property
    def params(self) -> float:
        """Returns the head's parameters divided by the stage's; infinite if the stage has none."""
        return self.head_params / self.stage_params if self.stage_params else math.inf

    def __str__(self) -> str:
        return f"{self.flops:.1%} of its stage's multiply-adds, {self.params:.1%} of its parameters"


def flops(module: nn.Module, shape: Sequence[int]) -> int:
    """Returns the multiply-adds of the forward of one sample, a float tensor of this shape, which leaves out the batch.

    Convolutions, matrix products and attention are counted; biases, norms, pools and activations are not. Attention counts every pair of
    positions, masked or not. A copy runs in eval mode, so weights, statistics and the random state stay as they are.
    """
    place = next(module.parameters(), torch.zeros(()))
    return _count(module, torch.zeros(1, *shape, device=place.device, dtype=place.dtype))[0]


def head_share(stage: nn.Module, head: nn.Module, inputs: Value, *, first: bool = False) -> HeadShare:
    """Returns the cost of `head` beside that of `stage`, counted on the first sample of a batch, on copies in eval mode.

    inputs: a batch as the stage takes it, a tensor or a tuple of tensors of any dtype, batch first. first: the head takes the first tensor
    of the stage's output alone.
    Raises UsageError if the head does not take the output of the stage.
    """
    stage_flops, out = _count(stage, map_tensors(lambda x: x[:1].detach().clone(), inputs))  # cloned: the stage may write into it
    try:
        head_flops, _ = _count(head, map_tensors(Tensor.detach, tensors(out)[0] if first else out))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        shapes = ", ".join(str(tuple(x.shape[1:])) for x in tensors(out))
        raise UsageError(f"the head does not take the output of its stage, of shape {shapes} without the batch: {error}") from error
    return HeadShare(head_flops, stage_flops, _params(head), _params(stage))


def _count(module: nn.Module, inputs: Value) -> tuple[int, Value]:
    """Returns the multiply-adds of one forward, and its output, with a graph."""
    from torch.utils.flop_counter import FlopCounterMode  # takes 0.1 s to import: only for methods with heads

    module = copy.deepcopy(module).eval()
    # with gradients and the plain attention: else fused kernels run, which the counter does not see on every device
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = module(inputs)
    return counter.get_total_flops() // 2, out


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
