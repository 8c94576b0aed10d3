"""Proves a split: outputs, gradients and buffers of the pieces, one after the other, are those of the model, to the last bit."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from delock.data.call import Call
from delock.data.seeding import seeded
from delock.execution import Modes
from delock.launch import allocator
from delock.links.wire import make_dense
from delock.partition.graph.digests import Gradients, NotApartError, Uses, caught, digest
from delock.partition.graph.examples import is_large
from delock.partition.graph.exported import answering
from delock.partition.graph.offloaded import bears_hooks, offloaded
from delock.partition.graph.python_state import attributes, refuse_changed
from delock.partition.graph.root import aliases, in_mode, root, shadow
from delock.partition.graph.segment import Segment, computation
from delock.partition.graph.structure import Structure, change, not_constant
from delock.tensors import is_floating, same, tensors

T = TypeVar("T")
SEED = 20_261_127  # any number: both are given the same, another one in every step, so that dropout draws the same


@dataclass
class Outcome:
    """Holds what one run has given: output tensors, digests or samples of gradients by the names of parameters, buffers by name.

    A parameter has one gradient, or where uses are looked at apart one for each.
    """

    outputs: tuple[Tensor, ...]
    gradients: dict[str, list[bytes | Tensor]]
    buffers: dict[str, Tensor]
    structure: Structure = ()  # of the model's output


def difference(
    model: nn.Module,
    call: Call,
    pieces: Sequence[Segment],
    examples: Sequence[Sequence[Tensor]],
    told: bool = False,
) -> str:
    """Returns the first thing in which the pieces differ from the model; "" if there is none.

    told: from the model when it knows that it is exported; that in turn may differ from the model in rounding.

    They take several steps on the same copies, in training and then in eval mode: a difference may show only after a step, as with buffers,
    or with what a forward leaves in Python's attributes.
    """
    look = partial(_difference, model, call, pieces, examples, told)
    return _sparingly(model, call, examples[0], look, lambda found: not found)


def structures_once_more(
    model: nn.Module, call: Call, pieces: Sequence[Segment], inputs: Sequence[Tensor], told: bool
) -> dict[bool, Structure]:
    """Returns the structures of the model's output in both modes; none if a step of pieces that were proved before differs from its own."""
    return _sparingly(model, call, inputs, partial(_structures, model, call, pieces, inputs, told), lambda found: True)


@dataclass(frozen=True)
class Sparing:
    """Holds how a proof spares memory.

    apart: what each use of a tied weight adds to its gradient is compared, and not the sum; equal pairs have equal sums.
    on_disk: there lies what a backward needs.
    """

    apart: bool = False
    on_disk: bool = False


def _sparingly(model: nn.Module, call: Call, inputs: Sequence[Tensor], look: Callable[[Sparing], T], enough: Callable[[T], bool]) -> T:
    """Looks at a proof, at that of a large model with little memory; with sums of gradients if what it finds is not enough."""
    if not is_large(model):
        return look(Sparing())
    with seeded(SEED):
        on_disk = bears_hooks(partial(_forward, model, call, inputs))
    with suppress(NotApartError):
        if enough(found := look(Sparing(True, on_disk))):
            return found
    return look(Sparing(False, on_disk))


def _structures(
    model: nn.Module, call: Call, pieces: Sequence[Segment], inputs: Sequence[Tensor], told: bool, spare: Sparing
) -> dict[bool, Structure]:
    own, cut, structures = Uses(shadow(model), spare.apart), _copies(pieces), dict[bool, Structure]()
    modes = [Modes(one, model.training) for one in (own.model, *cut)]
    for seed, training in enumerate((True, False), SEED):
        for mode in modes:
            mode.train() if training else mode.module.eval()
        found, structures[training] = _step(own, call, cut, inputs, training, told, spare, seed)
        if found:
            return {}
    return structures


def repeats(model: nn.Module, call: Call, inputs: Sequence[Tensor]) -> bool:
    """Returns True if the model computes the same again in training, from the same seed."""
    found = []
    for _ in range(2):
        with torch.no_grad(), seeded(SEED):
            found.append(_forward(model, call, inputs))
    return len(found[0]) == len(found[1]) and all(map(same, *found))


def _forward(model: nn.Module, call: Call, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns what a copy of the model computes in training."""
    found: tuple[Tensor, ...] = root(in_mode(model, True), call, len(inputs))(*(x.clone() for x in inputs))
    return found


def _difference(
    model: nn.Module, call: Call, pieces: Sequence[Segment], examples: Sequence[Sequence[Tensor]], told: bool, spare: Sparing
) -> str:
    own, cut = Uses(shadow(model), spare.apart), _copies(pieces)
    modes = [Modes(one, model.training) for one in (own.model, *cut)]
    kept = {name for piece in cut for name, one in piece.named_modules() if name and type(one) is not nn.Module}
    seen: dict[str, str] | None = None  # after the first batch
    structures = dict[bool, Structure]()
    steps = [(True, one) for one in (*examples, examples[0])] + [(False, one) for one in examples]
    for seed, (training, inputs) in enumerate(steps, SEED):
        for mode in modes:
            mode.train() if training else mode.module.eval()
        found, structure = _step(own, call, cut, inputs, training, told, spare, seed)
        if changes := change(structures.setdefault(training, structure), structure):
            raise not_constant(changes)
        if found:
            refuse_changed(seen or {}, attributes(own.model, kept))
            return f"{found} in {'training' if training else 'evaluation'}"
        if inputs is examples[0] and training:
            refuse_changed(seen or {}, now := attributes(own.model, kept))
            seen = now
    if told:
        for mode in modes:
            mode.train()
        with seeded(SEED):
            plain = _whole(Uses(in_mode(model, True), spare.apart), call, examples[0], True, samples=True)
        with seeded(SEED), answering(exporting=True, compiling=True):
            whole = _whole(Uses(in_mode(model, True), spare.apart), call, examples[0], True, samples=True)
        return _compared(plain, whole, close)
    return ""


def _step(
    own: Uses, call: Call, cut: Sequence[Segment], inputs: Sequence[Tensor], training: bool, told: bool, spare: Sparing, seed: int
) -> tuple[str, Structure]:
    """Returns the first thing in which a step of both differs, and the structure of the output.

    What a large model's step has taken goes back to the system before the next: it leaves little room.
    """
    give_back = allocator.give_back if is_large(own.model) else lambda: None
    give_back()
    keeping = partial(offloaded, own.model) if training and spare.on_disk else nullcontext
    with seeded(seed), keeping(), answering(exporting=True, compiling=True) if told else nullcontext():
        whole = _whole(own, call, inputs, training)
    give_back()
    with seeded(seed), keeping():
        return _compared(whole, _parts(cut, inputs, training, spare.apart), same), whole.structure


def _copies(pieces: Sequence[Segment]) -> list[Segment]:
    return copy.deepcopy(list(pieces), aliases(weight for piece in pieces for weight in piece.parameters()))


def _whole(own: Uses, call: Call, inputs: Sequence[Tensor], training: bool, *, samples: bool = False) -> Outcome:
    with torch.set_grad_enabled(training):
        under = root(own.model, call, len(inputs))
        outputs = under(*(x.clone() for x in inputs))
    own.refuse_repeated(outputs)
    with Gradients(own.learning(), samples=samples) as gradients:
        if training:
            _backward(outputs, _errors(outputs))
    given, buffers = tuple(x.detach() for x in outputs), dict(own.model.named_buffers())
    return Outcome(given, own.by_weight(gradients.found), buffers, under.structure)


def _parts(pieces: Sequence[Segment], inputs: Sequence[Tensor], training: bool, apart: bool) -> Outcome:
    ran, values = list[Ran](), [x.detach() for x in inputs]
    for i, piece in enumerate(pieces):
        ran.append(_run(piece, values, training, learns=training and i > 0))
        values = [x.detach() for x in ran[-1].out] if i == len(pieces) - 1 else make_dense([x.detach() for x in ran[-1].out])
    outputs, found = tuple(values), defaultdict[str, list[bytes | Tensor]](list)
    errors = _errors(outputs) if training else []
    for piece in reversed(pieces if training else []):
        errors = make_dense(_back(piece, ran.pop(), errors, found, apart))  # a sum over memory in another order has other last bits
    buffers = {name: b for piece in pieces for name, b in piece.named_buffers() if not name.startswith("copies.")}
    return Outcome(outputs, dict(found), buffers)


@dataclass
class Ran:
    """Holds a forward of a piece: its inputs, for each of them a list for its error, and its outputs."""

    leaves: list[Tensor]
    errors: list[list[Tensor]]
    out: tuple[Tensor, ...]


def _run(piece: Segment, values: Sequence[Tensor], training: bool, learns: bool) -> Ran:
    leaves = [x.detach().requires_grad_(learns and is_floating(x)) for x in values]
    does = computation(piece, piece.training)
    as_they_are = does.weights | set(does.handed.values())  # into others a piece may write
    with torch.set_grad_enabled(training):
        entries = [caught(x) for x in leaves]
        out = tensors(piece(tuple(x if i in as_they_are else x.clone() for i, (x, _) in enumerate(entries))))
    return Ran(leaves, [errors for _, errors in entries], out)


def _back(
    piece: Segment, ran: Ran, errors: list[Tensor | None], found: dict[str, list[bytes | Tensor]], apart: bool
) -> list[Tensor | None]:
    """Goes back through a piece, and returns an error per input, as stages send them: None where no output depends on it."""
    does = computation(piece, True)
    handed = {i: errors[j] for j, i in does.handed.items()}
    for j, name in does.own.items() if apart else ():
        if (error := errors[j]) is not None and piece.get_parameter(name).requires_grad:
            found[name].append(digest(error))  # what the uses above add to the gradient of a weight of this piece
        error = errors[j] = None
    for j in does.handed:
        errors[j] = None
    with Gradients({name: p for name, p in piece.named_parameters() if p.requires_grad}) as gradients:
        _backward(ran.out, errors)
    for name, one in gradients.found.items():
        found[name].append(one)
    made = [handed.get(i, come[0] if come else None) for i, come in enumerate(ran.errors)]
    return [e if x.requires_grad else None for x, e in zip(ran.leaves, made, strict=True)]


def _errors(outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns an error for each floating output: numbers that differ from place to place."""
    errors: list[Tensor | None] = []
    for x in outputs:
        wave = torch.arange(x.numel(), dtype=torch.float32, device=x.device).sin_().add_(1.5).reshape(x.shape)
        errors.append(wave.to(x.dtype) if is_floating(x) else None)
    return errors


def _backward(outputs: Sequence[Tensor], errors: Sequence[Tensor | None]) -> None:
    pairs = [(x, e) for x, e in zip(outputs, errors, strict=True) if x.requires_grad and e is not None]
    if pairs:
        roots, seeds = zip(*pairs, strict=True)
        torch.autograd.backward(roots, seeds)


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
        if not _alike(whole.gradients.get(name, []), parts.gradients.get(name, []), alike):
            return f"the gradient of {name}"
    return ""


def _alike(a: list[bytes | Tensor], b: list[bytes | Tensor], alike: Callable[[Tensor, Tensor], bool]) -> bool:
    """Compares samples in their order, and digests in any."""
    if all(isinstance(one, bytes) for one in (*a, *b)):
        return Counter(a) == Counter(b)
    return len(a) == len(b) and all(isinstance(x, Tensor) and isinstance(y, Tensor) and alike(x, y) for x, y in zip(a, b, strict=True))


def close(a: Tensor, b: Tensor) -> bool:
    """Returns True for tensors that are equal but for rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return not a.numel() or bool((a - b).abs().max() <= 1e-4 * a.abs().max()) if is_floating(a) else same(a, b)
