"""Copies of a module's buffers as a forward finds them, for a graph that may be computed or built again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from torch import Tensor, nn

Buffers: TypeAlias = dict[str, Tensor | None]
"""By name; None for a buffer that is registered, and is no tensor yet."""


def buffers_of(module: nn.Module) -> Buffers:
    """Returns the buffers of a module, each once."""
    return {name: buffer for _, own in _layers(module) for name, buffer in own.items()}


def cloned(buffers: Mapping[str, Tensor | None]) -> Buffers:
    """Returns copies."""
    return {name: None if buffer is None else buffer.detach().clone() for name, buffer in buffers.items()}


def _layers(module: nn.Module) -> Iterator[tuple[str, Buffers]]:
    """Yields the parts of a module that have buffers of their own: name, and buffers by their names in the module."""
    seen: set[int] = set()
    for prefix, layer in module.named_modules():
        own = {f"{prefix}{'.' if prefix else ''}{name}": b for name, b in layer._buffers.items() if b is None or id(b) not in seen}
        seen.update(map(id, own.values()))
        if own:
            yield prefix, own


class BufferCopies:
    """Takes copies of a module's buffers; those of a layer that has written to none of its own since then are the same as before.

    So a large buffer that is never written to, such as a mask, is copied once, and one that is written to late is noticed. Versions tell.
    Batch norm hides its writes to the statistics, but not that to its count of batches, so a layer is taken as a whole.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.taken: dict[str, tuple[list[Tensor | None], list[int], Buffers]] = {}  # layer -> its buffers, their versions, copies

    def take(self, written: tuple[str, ...] | None) -> Buffers:
        """Returns copies of all buffers. written: those that each forward writes to; None: not known yet."""
        found: Buffers = {}
        for layer, own in _layers(self.module):
            if written is None or not own.keys().isdisjoint(written) or not self._current(layer, own):
                self.taken[layer] = list(own.values()), _versions(own), cloned(own)
            found |= self.taken[layer][2]
        return found

    def outdated(self, copies: Buffers, written: tuple[str, ...] | None) -> Buffers:
        """Returns those of the copies that are not what the module has now."""
        now = {name: self.taken[layer][2][name] for layer, own in _layers(self.module) if self._current(layer, own) for name in own}
        return {name: one for name, one in copies.items() if name in (written or copies) or name not in now or now[name] is not one}

    def _current(self, layer: str, own: Buffers) -> bool:
        if layer not in self.taken:
            return False
        before, versions, _ = self.taken[layer]
        return len(before) == len(own) and all(map(_is, before, own.values())) and versions == _versions(own)


def _is(a: object, b: object) -> bool:
    return a is b


def _versions(own: Buffers) -> list[int]:
    return [0 if buffer is None else buffer._version for buffer in own.values()]
