"""Proves a split: outputs, gradients and buffers of the pieces, one after the other, are those of the model, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from delock.data.call import Call
from delock.execution import Modes
from delock.partition.graph.exported import answering
from delock.partition.graph.python_state import attributes, refuse_changed
from delock.partition.graph.root import in_mode, root, shadow
from delock.tensors import address, is_floating, tensors

SEED = 20_261_127  # any number: both are given the same, so that dropout draws the same


@dataclass
class Outcome:
    """Holds what one run has given: output tensors, gradients by the names of parameters, buffers by name."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def difference(model: nn.Module, call: Call, pieces: Sequence[nn.Module], examples: Sequence[Sequence[Tensor]], told: bool = False) -> str:
    """Returns the first thing in which the pieces differ from the model; "" if there is none.

    told: from the model when it knows that it is exported; that in turn may differ from the model in rounding.

    They take several steps on the same copies, in training and then in eval mode: a difference may show only after a step, as with buffers,
    or with what a forward leaves in Python's attributes.
    """
    own, cut = shadow(model), _copies(pieces)
    modes = [Modes(one, model.training) for one in (own, *cut)]
    kept = {name for piece in cut for name, one in piece.named_modules() if name and type(one) is not nn.Module}
    seen: dict[str, str] | None = None  # after the first batch
    with torch.random.fork_rng(devices=[]):
        for training, inputs in [(True, one) for one in (*examples, examples[0])] + [(False, one) for one in examples]:
            for mode in modes:
                mode.train() if training else mode.module.eval()
            with answering(exporting=True, compiling=True) if told else nullcontext():
                whole = _whole(own, call, inputs, training)
            if found := _compared(whole, _parts(cut, inputs, training), same):
                refuse_changed(seen or {}, attributes(own, kept))
                return f"{found} in {'training' if training else 'evaluation'}"
            if inputs is examples[0] and training:
                refuse_changed(seen or {}, now := attributes(own, kept))
                seen = now
        if told:
            for mode in modes:
                mode.train()
            plain = _whole(in_mode(model, True), call, examples[0], True)
            with answering(exporting=True, compiling=True):
                whole = _whole(in_mode(model, True), call, examples[0], True)
            return _compared(plain, whole, close)
    return ""


def _copies(pieces: Sequence[nn.Module]) -> list[nn.Module]:
    memo = {id(weight): weight for piece in pieces for weight in piece.parameters()}
    return copy.deepcopy(list(pieces), memo)


def _whole(model: nn.Module, call: Call, inputs: Sequence[Tensor], training: bool) -> Outcome:
    torch.default_generator.manual_seed(SEED)
    with torch.set_grad_enabled(training):
        outputs = root(model, call, len(inputs))(*(x.clone() for x in inputs))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = _gradients(outputs, list(named.values()), _errors(outputs)) if training else []
    return Outcome(outputs, _given(named, gradients), dict(model.named_buffers()))


def _parts(pieces: Sequence[nn.Module], inputs: Sequence[Tensor], training: bool) -> Outcome:
    held: list[tuple[list[Tensor], tuple[Tensor, ...]]] = []
    values: Sequence[Tensor] = [x.detach() for x in inputs]
    torch.default_generator.manual_seed(SEED)
    weights = {address(p) for piece in pieces for p in piece.parameters() if p.numel()}  # tied ones pass through pieces, and are not copied
    for i, piece in enumerate(pieces):
        leaves = _leaves(values, training and i > 0, weights)
        with torch.set_grad_enabled(training):
            out = tensors(piece(tuple(x if address(x) in weights else x.clone() for x in leaves)))
        held.append((leaves, out))
        values = [x.detach() for x in out]
    gradients = dict[str, Tensor]()
    errors = _errors(held[-1][1])
    for piece, (leaves, out) in zip(reversed(pieces), reversed(held), strict=True):
        if not training:
            break
        named = {name: p for name, p in piece.named_parameters() if p.requires_grad}
        inner = [x for x in leaves if x.requires_grad]
        found = _gradients(out, [*inner, *named.values()], errors)
        gradients |= _given(named, found[len(inner) :])
        errors = _to_inputs(leaves, found)
    buffers = {name: b for piece in pieces for name, b in piece.named_buffers() if not name.startswith("copies.")}
    return Outcome(held[-1][1], gradients, buffers)


def _leaves(values: Sequence[Tensor], training: bool, weights: set[int]) -> list[Tensor]:
    own = [x.detach() if address(x) in weights else x.detach().clone() for x in values]
    return [x.requires_grad_(training and is_floating(x)) for x in own]


def _errors(outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns an error for each floating output: numbers that differ from place to place."""
    errors: list[Tensor | None] = []
    for x in outputs:
        wave = torch.arange(x.numel(), dtype=torch.float32, device=x.device).sin().add(1.5).reshape(x.shape)
        errors.append(wave.to(x.dtype) if is_floating(x) else None)
    return errors


def _gradients(outputs: Sequence[Tensor], wanted: Sequence[Tensor], errors: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = [(x, e) for x, e in zip(outputs, errors, strict=True) if x.requires_grad and e is not None]
    if not pairs or not wanted:
        return [None] * len(wanted)
    roots, seeds = zip(*pairs, strict=True)
    return list(torch.autograd.grad(roots, wanted, seeds, allow_unused=True))


def _to_inputs(leaves: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns an error per input of a piece, as stages send them: zeros where the output does not depend on it."""
    source = iter(found)
    return [(e if (e := next(source)) is not None else torch.zeros_like(x)) if x.requires_grad else None for x in leaves]


def _given(named: Mapping[str, Tensor], gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {name: g for name, g in zip(named, gradients, strict=False) if g is not None}


def _compared(whole: Outcome, parts: Outcome, alike: Callable[[Tensor, Tensor], bool]) -> str:
    if len(whole.outputs) != len(parts.outputs):
        return "the number of tensors that it returns"
    for i, (a, b) in enumerate(zip(whole.outputs, parts.outputs, strict=True)):
        if not alike(a, b):
            return f"output {i}"
    for name, buffer in whole.buffers.items():
        if name in parts.buffers and not alike(buffer, parts.buffers[name]):
            return f"the buffer {name}"
    for name in (*whole.gradients, *parts.gradients):
        if name not in parts.gradients or name not in whole.gradients or not alike(whole.gradients[name], parts.gradients[name]):
            return f"the gradient of {name}"
    return ""


def same(a: Tensor, b: Tensor) -> bool:
    """Returns True for equal tensors; NaN equals NaN."""
    if a.layout == torch.sparse_coo == b.layout:
        a, b = a.to_dense(), b.to_dense()
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b) or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


def close(a: Tensor, b: Tensor) -> bool:
    """Returns True for tensors that are equal but for rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return not a.numel() or bool((a - b).abs().max() <= 1e-4 * a.abs().max()) if is_floating(a) else same(a, b)
