"""Digests of gradients, taken as a backward makes them, so that those of a whole model never lie in memory together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from delock.partition.graph.root import aliases
from delock.tensors import is_floating

CHUNK = 1 << 18  # elements that are digested together
SAMPLES = 1 << 16  # elements of a gradient that are compared where rounding may differ


class Gradients:
    """Notes, within the block, the digest of every gradient that comes to one of the parameters, by name, and lets go of the gradient.

    samples: of every gradient some elements, in place of the digest. A parameter without a gradient has no entry.
    """

    def __init__(self, named: Mapping[str, Tensor], *, samples: bool = False) -> None:
        self.named, self.samples = named, samples
        self.found: dict[str, bytes | Tensor] = {}

    def __enter__(self) -> Gradients:
        hooked = ((one.register_post_accumulate_grad_hook, partial(self._take, name)) for name, one in self.named.items())
        self.hooks = [register(hook) for register, hook in hooked]  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _take(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.found[name] = _sample(parameter.grad) if self.samples else digest(parameter.grad)
        parameter.grad = None


class Uses:
    """Holds a copy of a model, in which every use of a tied weight may have a parameter of its own over the same memory.

    apart: so it is. Then a gradient is what one use adds. That is the same as to compare sums only if no weight has more than two uses.
    """

    def __init__(self, model: nn.Module, apart: bool) -> None:
        self.model = model
        self.named = dict(model.named_parameters(remove_duplicate=not apart))
        first: dict[int, str] = {}
        self.names = {name: first.setdefault(id(weight), name) for name, weight in self.named.items()}  # name -> the weight's first name
        for name, one in self.names.items():
            if name != one:
                owner, _, last = name.rpartition(".")
                self.named[name] = aliases([self.named[one]])[id(self.named[one])]
                model.get_submodule(owner)._parameters[last] = self.named[name]

    def learning(self) -> dict[str, Tensor]:
        """Returns the parameters that learn, by name."""
        return {name: one for name, one in self.named.items() if one.requires_grad}

    def refuse_repeated(self, outputs: Sequence[Tensor]) -> None:
        """Raises NotApartError if a tied weight has more than two uses: then the order counts in which they are added."""
        tied = {one for name, one in self.names.items() if name != one}
        counts = _uses(outputs) if tied else {}
        for weight in tied:
            uses = [counts.get(id(self.named[name]), 0) for name, one in self.names.items() if one == weight]
            if max(uses) > 1 or sum(uses) > 2:
                raise NotApartError

    def by_weight(self, found: Mapping[str, bytes | Tensor]) -> dict[str, list[bytes | Tensor]]:
        """Returns what was found of every use, by the first name of the weight."""
        uses: dict[str, list[bytes | Tensor]] = {}
        for name in self.names:
            if name in found:
                uses.setdefault(self.names[name], []).append(found[name])
        return uses


class NotApartError(Exception):
    """Raised where sums must be compared."""


def caught(leaf: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns a tensor to be used in place of a leaf, and a list into which a backward puts the error that comes to it, as it comes."""
    errors: list[Tensor] = []
    return (_Catch.apply(leaf, errors) if leaf.requires_grad else leaf), errors


class _Catch(torch.autograd.Function):
    """Passes a tensor on, and no error back."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, errors: list[Tensor]) -> Tensor:
        ctx.errors = errors
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, *errors: Any) -> Any:
        ctx.errors += errors
        return None, None


def _uses(outputs: Sequence[Tensor]) -> dict[int, int]:
    """Returns, for parameters by id, the number of operations that use them."""
    counts, seen = dict[int, int](), set[Any]()
    left = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while left:
        for one, _ in left.pop().next_functions:
            if one is None:
                continue
            if (weight := getattr(one, "variable", None)) is not None:
                counts[id(weight)] = counts.get(id(weight), 0) + 1
            elif one not in seen:
                seen.add(one)
                left.append(one)
    return counts


def digest(tensor: Tensor) -> bytes:
    """Returns the same bytes for tensors that are equal, where NaN equals NaN, and others for others."""
    hashed = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    with torch.no_grad():
        flat = tensor.detach().to_dense().cpu().reshape(-1)
        flat = torch.view_as_real(flat.resolve_conj().resolve_neg()).reshape(-1) if flat.is_complex() else flat
        for chunk in torch.split(flat, CHUNK):
            if is_floating(chunk):
                chunk = chunk + 0.0  # -0 is equal to 0
                if not chunk.sum().isfinite():
                    chunk = torch.where(chunk == chunk, chunk, torch.nan)
            hashed.update(chunk.contiguous().view(torch.uint8).numpy().data)
    return hashed.digest()


def _sample(gradient: Tensor) -> Tensor:
    flat = gradient.detach().to_dense().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLES)].clone()
