"""A module through torch.compile: compiled once, before training, for the shapes that will come; whatever else comes runs as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.batchnorm import _NormBase

from delock.errors import UsageError
from delock.links.message import Tree
from delock.stage.values import like, tensors


class Compiled(nn.Module):
    """`inner`, compiled; called with one argument, as it is. Parameters and buffers may be swapped under it by functional_call.

    Inside `compiling` it compiles what it is called with; else what has not been compiled (a smaller last batch) runs uncompiled. Random
    numbers are torch's, not inductor's: dropout has the masks of the uncompiled module, unless the layout of its input is another one.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

        def run(given: Tree) -> Tree:
            return inner(given)

        run.__code__ = run.__code__.replace()  # torch keeps what it compiled, of which there may be eight, by code object
        self.run = torch.compile(run, dynamic=False, options={"fallback_random": True})
        self.stance: Literal["default", "eager_on_recompile"] = "eager_on_recompile"

    def forward(self, given: Tree) -> Tree:
        # Running statistics are written by autograd's rules here, but not in an uncompiled forward, whose graph would seem to be damaged.
        statistics = tuple(b for m in self.inner.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False))
        with torch.compiler.set_stance(self.stance), _unsafe_preserve_version_counter(statistics):
            return self.run(given)

    @contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Where it may compile. Raises UsageError, about `what`, where that fails.

        Buffers that a backward may write to are turned off, because a graph may be needed by several.
        """
        self.stance = "default"
        try:
            with torch._functorch.config.patch(donated_buffer=False):
                yield
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(_complaint(what, error)) from error
        finally:
            self.stance = "eager_on_recompile"


def _complaint(what: str, error: Exception) -> str:
    said = str(error).strip().split("\n")[0]
    if "InvalidCxxCompiler" in said:
        return "torch.compile needs a C++ compiler and finds none: install g++, name one in the environment as CXX, or leave compile out"
    return f"torch.compile does not take {what}: {said}; leave compile out"


def pieces(example: Tree, parts: int) -> list[Tree]:
    """Inputs as the micro-batches of a batch have them, one of every shape; `example`: a batch on the meta device."""
    whole = tensors(example)
    rows = len(whole[0])
    split = [[t.tensor_split(parts)[j] if t.dim() and len(t) == rows else t for t in whole] for j in range(parts)]
    found = {tuple(t.shape for t in part): like(example, part) for part in split if len(part[0])}
    return list(found.values())


def zeros(example: Tree, device: torch.device) -> Tree:
    """Inputs of the shapes and dtypes of an example."""
    made: list[Tensor] = [torch.zeros(t.shape, dtype=t.dtype, device=device) for t in tensors(example)]
    return like(example, made)
