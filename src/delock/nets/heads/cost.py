"""What a head costs beside its stage: multiply-adds and parameters. Design rule of DGL: at most about 5 % of the stage's multiply-adds."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from delock.errors import UsageError

Value: TypeAlias = Tensor | tuple[Tensor, ...]  # what goes from stage to stage


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Multiply-adds of the forward of one sample, and numbers of parameters, of a head and of its stage (without the head)."""

    head_flops: int
    stage_flops: int
    head_params: int
    stage_params: int

    @property
    def flops(self) -> float:
        """The head's multiply-adds over the stage's; infinite for a stage that has none."""
        return self.head_flops / self.stage_flops if self.stage_flops else math.inf

    @property
    def params(self) -> float:
        """The head's parameters over the stage's; infinite for a stage that has none."""
        return self.head_params / self.stage_params if self.stage_params else math.inf

    def __str__(self) -> str:
        return f"{self.flops:.1%} of its stage's multiply-adds, {self.params:.1%} of its parameters"


def flops(module: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of the forward of one sample of this shape (float, without the batch): of convolutions, matrix products, attention.

    Biases, norms, pools and activations count nothing; attention counts every pair of positions, masked or not.
    Works on a copy in eval mode: weights, statistics and the random state stay as they are.
    """
    place = next(module.parameters(), torch.zeros(()))
    return _count(module, torch.zeros(1, *shape, device=place.device, dtype=place.dtype))[0]


def head_share(stage: nn.Module, head: nn.Module, inputs: Value) -> HeadShare:
    """What `head` costs beside `stage`. inputs: a batch as the stage takes it, a tensor or a tuple of tensors of any dtype, batch first.

    Runs the first sample only, on copies in eval mode. Raises UsageError if the head does not take what the stage puts out.
    """
    stage_flops, out = _count(stage, tree_map_only(Tensor, lambda x: x[:1].detach().clone(), inputs))  # cloned: it may be written on
    try:
        head_flops, _ = _count(head, out)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        shapes = ", ".join(str(tuple(x.shape[1:])) for x in ((out,) if isinstance(out, Tensor) else out))
        raise UsageError(f"the head does not take the output of its stage, of shape {shapes} without the batch: {error}") from error
    return HeadShare(head_flops, stage_flops, _params(head), _params(stage))


def _count(module: nn.Module, inputs: Value) -> tuple[int, Value]:
    """Multiply-adds of one forward, and its output."""
    module = copy.deepcopy(module).eval()
    # with gradients and the plain attention: else fused kernels run, which the counter does not see on every device
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = module(inputs)
    return counter.get_total_flops() // 2, tree_map_only(Tensor, Tensor.detach, out)


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
