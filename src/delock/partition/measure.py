"""Measures the cost of each layer on one batch: seconds, bytes of its output, parameters, memory."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from delock.errors import DelockError, UsageError, said
from delock.execution import PLAIN, Loss, Modes, compute_loss, given, lay_out_input, lay_out_weights
from delock.options import Execution
from delock.partition.copying import copied_but_for_handles
from delock.partition.graph.root import aliases
from delock.partition.graph.segment import Segment
from delock.partition.layer_memory import LayerMemory, LayerTrial, observe, root
from delock.partition.layers import Layer
from delock.partition.lean import lean
from delock.partition.learning_loss import foreign_weight, refuse_learning_loss
from delock.partition.work import Work
from delock.recomputation import Rereading
from delock.tensors import Value, is_value, kind, layout, like, map_tensors, shown, tensors

REENTRANT, UNTRAINED = "use_reentrant=True", "None of the inputs have requires_grad=True"  # in torch's error, and in its warning
_IN_VAIN = (
    "is checkpointed with use_reentrant=True, a form of torch.utils.checkpoint without gradients of chosen tensors, which a stage takes, "
    "and without any where the inputs need none: give it use_reentrant=False"
)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Holds the cost of one layer on one batch."""

    forward_s: float  # seconds of a forward, in training mode; the last layer's includes the loss
    backward_s: float  # seconds of a backward
    out_bytes: int  # of the output: what a link carries if the network is cut behind the layer
    params: int  # number of parameters
    shape: tuple[int, ...] = ()  # of the output for one sample, without the batch; () for a tuple of tensors
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()  # shape, with the batch, and dtype of every tensor of the output
    memory: LayerMemory | None = None  # None where it cannot be counted
    recomputes: bool = False  # it computes again in a backward, as with torch.utils.checkpoint
    work: float = 0.0  # multiply-adds, and bytes in their place: the same in every run; 0 where it was not asked for
    whole: tuple[int, ...] = ()  # places of the outputs that are not divided with a batch, such as a weight that both sides of a cut use

    @property
    def total_s(self) -> float:
        """Returns the seconds of forward and backward together."""
        return self.forward_s + self.backward_s


def with_whole(costs: Sequence[LayerCost], layers: Sequence[Layer], state: Mapping[str, Tensor], rows: int) -> list[LayerCost]:
    """Returns the costs with the outputs that parts of a batch do not divide: weights and buffers, and what has no dimension of samples.

    state: the weights and buffers of the unsplit model, by name; rows: samples of the batch.
    """
    found = []
    for cost, behind in zip_longest(costs, layers[1:]):
        ties = [tuple(state[name].shape) for name, _ in behind.ties if name in state] if behind else []
        whole = []
        for i, (shape, _) in enumerate(cost.outputs):
            if shape in ties:
                ties.remove(shape)
                whole.append(i)
            elif all(size % rows for size in shape):
                whole.append(i)
        found.append(replace(cost, whole=tuple(whole)))
    return found


def measure(
    layers: Sequence[Layer],
    inputs: Value,
    targets: Any,
    loss: Loss,
    *,
    repeats: int = 2,
    device: torch.device | str = "cpu",
    execution: Execution = PLAIN,
    learns: bool = False,
    counts: bool = False,
) -> list[LayerCost]:
    """Measures every layer in training mode on one batch; seconds are the median of `repeats` runs, after one that warms up.

    inputs: a tensor or a tuple of tensors, any dtype, as the model takes them; targets: any tree of tensors, as the loss takes them.
    Memory is counted in the run that warms up. Only one layer at a time is copied and run, so weights, statistics and the random
    state stay as they are, and no more memory is needed than one layer takes. What a piece of a traced model only hands on is left out.
    counts: also count the work of every layer, in one more run.
    As in training, a backward computes the gradient of a layer's input only if something before it learns; learns: the inputs need one.
    Raises UsageError if a layer or the loss raises anything, or returns something that cannot go on from it.
    """
    device = torch.device(device)
    costs = []
    value: Value = map_tensors(lambda x: lay_out_input(execution, x.to(device)), inputs)
    targets = map_tensors(lambda x: x.detach().to(device), targets)  # a loss that learns from them is no fault of its own
    wants = tuple(learns and x.is_floating_point() for x in tensors(value))  # per tensor: it needs a gradient
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        for i, layer in enumerate(layers):
            last = i == len(layers) - 1
            behind = partial(_loss, loss, targets) if last else None
            with _explained(i, layer, value):
                module = lay_out_weights(execution, own_copy(layer.module).to(device))
                Modes(module, layer.trains).train()
                part = lean(module)
                given = part.used(tensors(value)) if part else tensors(value)
                what = part or module, like(value, given), part.used(wants) if part else wants, behind, device, execution
                memory = _observed(*what)
                runs = [_run(*what) for _ in range(repeats)]
                work = _counted(*what) if counts else 0.0
            forwards, backwards, outs, recomputes = zip(*runs, strict=True)
            out = outs[-1]
            learned = tuple(x.requires_grad for x in tensors(out))
            if part:
                learned = part.whole(wants, {j: x.requires_grad for j, x in part.own.items()}, learned)
                made = part.whole(tensors(value), part.own, tensors(out))
                out = made[0] if len(made) == 1 else made
                memory = part.memory(memory) if memory else None
            out_bytes = sum(x.numel() * x.element_size() for x in tensors(out))
            params = sum(p.numel() for p in module.parameters())
            shape = tuple(out.shape[1:]) if isinstance(out, Tensor) else ()
            outputs = tuple((tuple(x.shape), x.dtype) for x in tensors(out))
            medians = statistics.median(forwards), statistics.median(backwards)
            costs.append(LayerCost(*medians, out_bytes, params, shape, outputs, memory, recomputes[0], work))
            wants = learned
            value = map_tensors(Tensor.detach, out)
    return costs


def own_copy(module: nn.Module) -> nn.Module:
    """Returns a copy; that of a piece shares the memory of its weights, to which no traced model writes."""
    return copied_but_for_handles(module, aliases(module.parameters()) if isinstance(module, Segment) else {})


def _observed(
    module: nn.Module, value: Value, wants: Sequence[bool], loss: Callable[[Any], Tensor] | None, device: torch.device, execution: Execution
) -> LayerMemory | None:
    """Returns the layer's memory, or None if it cannot be counted; the timed runs show whether the layer works without the counter."""
    try:
        return observe(module, value, wants, loss, device, execution)
    except Exception:
        return None


def _counted(
    module: nn.Module, value: Value, wants: Sequence[bool], loss: Callable[[Any], Tensor] | None, device: torch.device, execution: Execution
) -> float:
    """Returns the layer's work; where its operations cannot be seen, that of reading its weights and input a few times."""
    seen = Work()
    with seen:
        try:
            _run(module, value, wants, loss, device, execution)
        except Exception:  # the timed runs have shown that the layer works: it is the look that it does not bear
            seen.multiply_adds, seen.bytes = 0, 6 * sum(x.nbytes for x in (*tensors(value), *module.parameters()))
    return seen.total(device.type)


def _run(
    module: nn.Module, value: Value, wants: Sequence[bool], loss: Callable[[Any], Tensor] | None, device: torch.device, execution: Execution
) -> tuple[float, float, Value, bool]:
    """Returns the seconds of one forward and of one backward, the output, its graph freed, and if the backward computed something again."""
    trial = LayerTrial(module, value, wants, loss, device, execution)
    began = _now(device)
    out = trial.forward()
    if not is_value(out):
        raise _NoValueError(f"returns {kind(out)}, and only a tensor or a tuple of tensors can go from layer to layer: wrap it")
    if other := layout(out):
        raise _NoValueError(f"returns {other}, and only dense tensors can go from layer to layer: let it return out.to_dense()")
    ends = trial.ends(out)
    forward_s = _now(device) - began
    if foreign := foreign_weight(tensors(out), [*trial.there, *trial.wanted], lambda: tensors(trial.forward())):
        raise _NoValueError(foreign)
    if loss:
        refuse_learning_loss(ends, tensors(out))
    if not ends:
        return forward_s, 0.0, out, False
    roots = ends if loss else [root(x, _always(torch.ones_like(x))) for x in ends]
    with Rereading(module) as reading:
        began = _now(device)
        trial.backward(roots)
        backward_s = _now(device) - began
    return forward_s, backward_s, out, reading.seen


def _always(error: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: error


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _loss(loss: Loss, targets: Any, outputs: Any) -> Tensor:
    """Returns the loss. Raises UsageError, about the loss and not about the layer in front of it, for whatever the loss raises."""
    try:
        return compute_loss(loss, outputs, targets)
    except (torch.OutOfMemoryError, DelockError):
        raise
    except Exception as error:
        raise UsageError(f"the loss failed: {said(error)}; {given(outputs, targets)}") from error


@contextmanager
def _explained(i: int, layer: Layer, value: Value) -> Iterator[None]:
    """Turns what a layer raises in a trial into a UsageError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", UNTRAINED, UserWarning)
            yield
    except _NoValueError as error:
        raise UsageError(f"{layer.called(i)} {error}") from None
    except (torch.OutOfMemoryError, DelockError):
        raise
    except Exception as error:
        if REENTRANT in str(error) or UNTRAINED in str(error):
            raise UsageError(f"{layer.called(i)} {_IN_VAIN}") from error
        if isinstance(error, Warning):
            raise
        raise UsageError(f"{layer.called(i)} fails on its input {shown(value)}: {said(error)}") from error


class _NoValueError(Exception):
    """Raised for an output that is not made of tensors."""
