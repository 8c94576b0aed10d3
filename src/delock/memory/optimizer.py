"""Bytes of an optimizer, from a table: those of its state, and what a step of it needs beside.

None is built to find out. A process' first optimizer loads torch's compiler, which takes seconds, and torch refuses fused ones on the
meta device. So each row says what torch's own code does, and tests/test_optimizer_bytes.py compares it with two real steps:

    single     one weight after the other: temporaries as large as it, while some of the weight before are there until they are replaced
    foreach    all weights at once, with temporaries for all of them; torch's choice on a GPU
    fused      no temporaries

A factory of another kind says it itself, by a method `bytes`, or nothing is known of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn, optim

from delock.optim.feedback import error_feedback
from delock.optim.objects import OptimizerLike
from delock.optim.stage_facts import ALONE, StageFacts, for_stage

Named: TypeAlias = Sequence[tuple[str, Tensor]]
"""Weights by their names in the unsplit model. Their shapes and dtypes are read, never their values."""

NUMBER = 4  # bytes of a count of steps, and of other single numbers


@runtime_checkable
class SizedFactory(Protocol):
    """A factory of optimizers that knows how much memory they take. `bytes` may ask for the stage, as the factory may."""

    def bytes(self, named: Named, /) -> tuple[int, int]:
        """Returns bytes of the state that the first step makes, and peak bytes during a later step, above that state."""
        ...


class BytesPerWeight(NamedTuple):
    """Bytes for a weight: of the state that the first step makes, and of what a step needs beside."""

    state: Callable[[Tensor], float]
    numbers: int  # single numbers in the state
    single: Callable[[Tensor], float]
    left: int = 0  # temporaries of the weight before, as large as that one
    foreach: float = 0  # where all weights go at once: temporaries as large as each
    largest: float = 0  # and some for one weight at a time


Options: TypeAlias = Mapping[str, Any]


def learned(module: nn.Module, head: nn.Module | None, k: int) -> Named:
    """Returns the weights of stage k that learn, named as the stage names them."""
    names = getattr(module, "original", {})
    own = [(names.get(name, name), w) for name, w in module.named_parameters()]
    own += [(f"heads.{k}.{name}", w) for name, w in head.named_parameters()] if head else []
    return [(name, w) for name, w in own if w.requires_grad]


def fixed_bytes(module: nn.Module, head: nn.Module | None) -> int:
    """Returns the bytes of a stage's parameters that do not learn, and of its buffers."""
    own = [one for part in (module, head) if part for one in part.parameters() if not one.requires_grad]
    return sum(one.nbytes for one in [*own, *(buffer for part in (module, head) if part for buffer in part.buffers())])


def optimizer_bytes(optimizer: Callable[..., object], weights: Named, device: str, stage: StageFacts = ALONE) -> tuple[int, int] | None:
    """Returns bytes of the state that the first steps make, and peak bytes during a later step, above that state; None: unknown.

    Known are classes of torch.optim, functools.partial of one, objects of one, and factories with a method `bytes`, alone or with error
    feedback.
    """
    if not weights:
        return 0, 0
    if isinstance(optimizer, error_feedback):
        base = optimizer_bytes(optimizer.base, weights, device, stage)
        return base and (base[0] + optimizer.own_bytes(weights, stage=stage), base[1])
    if isinstance(optimizer, SizedFactory):
        return for_stage(optimizer.bytes, stage)(weights)
    if isinstance(optimizer, OptimizerLike):
        return _like_bytes(optimizer, dict(weights), device)
    made = optimizer if isinstance(optimizer, partial) else partial(optimizer)
    if not isinstance(made.func, type) or made.func not in TABLE or made.args:
        return None
    options = _defaults(made.func) | made.keywords
    return _held(TABLE[made.func](options), [w for _, w in weights], options, torch.device(device))


def _like_bytes(optimizer: OptimizerLike, weights: Mapping[str, Tensor], device: str) -> tuple[int, int] | None:
    """Returns those of an optimizer like one that was given: it steps one group after the other."""
    if optimizer.kind not in TABLE:
        return None
    bytes_of_groups = [(0, 0)]
    for group, names in zip(optimizer.groups, optimizer.held(weights), strict=True):
        if names:
            options = {**_defaults(optimizer.kind), **optimizer.options, **group.options}
            bytes_of_groups.append(_held(TABLE[optimizer.kind](options), [weights[name] for name in names], options, torch.device(device)))
    state, step = zip(*bytes_of_groups, strict=True)
    return sum(state), max(step)


def _defaults(kind: type) -> dict[str, Any]:
    return {name: one.default for name, one in inspect.signature(kind).parameters.items()}


def _held(row: BytesPerWeight, weights: Sequence[Tensor], options: Options, device: torch.device) -> tuple[int, int]:
    state = sum(map(row.state, weights)) + NUMBER * row.numbers * len(weights)
    sizes = [w.nbytes for w in weights]
    if options.get("fused"):
        step = 0.0
    elif options.get("foreach") or (options.get("foreach", False) is None and device.type == "cuda"):
        step = row.foreach * sum(sizes) + row.largest * max(sizes)
    else:
        step = max(row.single(w) + row.left * before for w, before in zip(weights, [0, *sizes], strict=False))
    return round(state), round(step)


def _times(tensors: int) -> Callable[[Tensor], float]:
    """Returns the bytes of this number of tensors as large as the weight."""
    return lambda weight: tensors * weight.nbytes


def _new_gradient(o: Options) -> bool:
    """Says whether a step makes a gradient of its own from the given one."""
    return bool(o["maximize"] or (o.get("weight_decay") and not o.get("decoupled_weight_decay")))


def _sgd(o: Options) -> BytesPerWeight:
    made = bool(o["maximize"]) + bool(o["weight_decay"])
    return BytesPerWeight(_times(bool(o["momentum"])), 0, _times(made + bool(o["nesterov"])), foreach=min(made, 1))


def _adam(o: Options) -> BytesPerWeight:
    return BytesPerWeight(_times(2 + bool(o["amsgrad"])), 1, _times(2 + _new_gradient(o)), left=1, foreach=1)


def _adamw(o: Options) -> BytesPerWeight:
    return _adam({**o, "decoupled_weight_decay": True})


def _nadam(o: Options) -> BytesPerWeight:
    return BytesPerWeight(_times(2), 2, _times(2 + _new_gradient(o)), left=1, foreach=1 + _new_gradient(o))


def _radam(o: Options) -> BytesPerWeight:
    return BytesPerWeight(_times(2), 1, _times(2 + _new_gradient(o)), foreach=1)


def _adamax(o: Options) -> BytesPerWeight:
    return BytesPerWeight(_times(2), 1, _times(1 + _new_gradient(o)), foreach=1)


def _adagrad(o: Options) -> BytesPerWeight:
    return BytesPerWeight(_times(0), 0, _times(1 + _new_gradient(o)), left=1, foreach=2)  # its state is there when it is built


def _adadelta(o: Options) -> BytesPerWeight:
    return BytesPerWeight(_times(2), 1, _times(2 + _new_gradient(o)), left=1, foreach=2 + _new_gradient(o))


def _rmsprop(o: Options) -> BytesPerWeight:
    state = 1 + bool(o["momentum"]) + bool(o["centered"])
    return BytesPerWeight(_times(state), 1, _times(1 + _new_gradient(o)), left=1, foreach=1 + _new_gradient(o))


def _rprop(o: Options) -> BytesPerWeight:
    return BytesPerWeight(_times(2), 1, _times(3), left=bool(o["maximize"]), foreach=1, largest=1.25)


def _asgd(o: Options) -> BytesPerWeight:
    return BytesPerWeight(_times(1), 3, _times(_new_gradient(o)), foreach=1 + bool(o["maximize"]))


def _adafactor(o: Options) -> BytesPerWeight:
    """Its second moments are kept as sums of rows and columns, and it takes one weight after the other on a GPU too."""
    made = 1 + bool(o["maximize"])
    foreach, largest = (made, 0) if o["foreach"] else (0, made + 1)
    return BytesPerWeight(_rows_and_columns, 1, _times(made), left=1, foreach=foreach, largest=largest)


def _rows_and_columns(weight: Tensor) -> float:
    return weight.nbytes * (1 / weight.shape[-1] + 1 / weight.shape[-2]) if weight.dim() > 1 else weight.nbytes


def _muon(o: Options) -> BytesPerWeight:
    """A step takes bfloat16 powers of the gradient: two of its shape, two as wide and high as its shorter side."""
    return BytesPerWeight(_times(1), 0, lambda w: bool(o["nesterov"]) * w.nbytes + 2 * (2 * w.numel() + 2 * min(w.shape) ** 2))


TABLE: Mapping[Callable[..., optim.Optimizer], Callable[[Options], BytesPerWeight]] = MappingProxyType(
    {
        optim.SGD: _sgd,
        optim.Adam: _adam,
        optim.AdamW: _adamw,
        optim.NAdam: _nadam,
        optim.RAdam: _radam,
        optim.Adamax: _adamax,
        optim.Adagrad: _adagrad,
        optim.Adadelta: _adadelta,
        optim.RMSprop: _rmsprop,
        optim.Rprop: _rprop,
        optim.ASGD: _asgd,
        optim.Adafactor: _adafactor,
        optim.Muon: _muon,
    }
)
