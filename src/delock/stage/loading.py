"""Loads a module's state as a run left it: also where buffers have been replaced by others, or are in no state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from delock.checkpoints.encoding import copied
from delock.errors import UsageError
from delock.stage.buffers import Buffers, buffers_of

Held: TypeAlias = tuple[dict[str, Any], dict[str, Tensor]]
"""The state dict of a module, and its weights and buffers that are in none: what `load_module` takes."""


def snapshot(module: nn.Module) -> Held:
    """Returns a copy of a module's state. Raises UsageError for state that cannot be copied."""
    found: Held = copied((dict(module.state_dict()), volatile(module)), "the weights")
    return found


def volatile(module: nn.Module) -> dict[str, Tensor]:
    """Returns the weights and buffers that are not in the module's state dict: persistent=False, or left out by a hook."""
    kept = module.state_dict()
    both = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in both.items() if name not in kept}


def load_module(module: nn.Module, state: Mapping[str, Any], rest: Mapping[str, Tensor], what: str) -> None:
    """Loads what `state_dict` and `volatile` returned. Raises UsageError, about `what`, for that of another network."""
    buffers = buffers_of(module)
    with torch.no_grad():
        for name in buffers:
            _make_room(module, name, {**state, **rest}.get(name))
        own = module.state_dict()
        _refuse_other(own, state, what)
        now: dict[str, Any] = {**dict(module.named_parameters()), **buffers_of(module)}
        _refuse_other({name: now.get(name) for name in rest}, rest, what)
        given: Any = type(own)(state)
        given._metadata = own._metadata  # type: ignore[attr-defined]  # the versions of the modules' code, which have not changed
        module.load_state_dict(given, strict=False)  # names have been compared; a hook may leave some of them out
        for name, value in rest.items():
            now[name].copy_(value)


def known(module: nn.Module) -> set[str]:
    """Returns the names of a module's state: of its state dict, of what is in none, and of buffers that are None."""
    return {*module.state_dict(), *volatile(module), *buffers_of(module)}


def make_buffers(module: nn.Module, state: Mapping[str, Any], rest: Mapping[str, Tensor]) -> None:
    """Registers the buffers that a module had made in its calls, and has not made yet."""
    own = known(module)
    for name, value in {**state, **rest}.items():
        if name not in own and isinstance(value, Tensor):
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner).register_buffer(last, torch.empty_like(value), persistent=name in state)


def _make_room(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Lets a buffer have the shape and the dtype of the value, or be none."""
    owner, _, last = name.rpartition(".")
    buffers: Buffers = module.get_submodule(owner)._buffers
    now = buffers[last]
    if value is None:
        buffers[last] = None
    elif now is None or now.shape != value.shape or now.dtype != value.dtype:
        device = next((t.device for t in (now, *module.parameters()) if t is not None), value.device)
        buffers[last] = torch.empty_like(value, device=device)


def _refuse_other(own: Mapping[str, Any], saved: Mapping[str, Any], what: str) -> None:
    """Raises UsageError for names, or shapes of tensors, that are others."""
    for name in sorted(own.keys() | saved.keys()):
        shapes = [list(one[name].shape) if isinstance(one.get(name), Tensor) else name in one for one in (own, saved)]
        if shapes[0] != shapes[1]:
            now, then = (_said(one) for one in shapes)
            raise UsageError(f"the {what} is not that of the checkpoint: {name} was {then} then, and is {now} now")


def _said(shape: Any) -> str:
    return f"of shape {tuple(shape)}" if isinstance(shape, list) else "there" if shape else "not there"
