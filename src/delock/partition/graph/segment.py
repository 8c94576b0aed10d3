"""One piece of a model's graph as a module: its input is what is alive in front of it, its output what is alive behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from delock.tensors import Value, tensors

NAME = "forward"
PLACE = "_delock_place"  # the attribute of a Segment that has its device


class Program:
    """Holds the code of a piece, which fx writes as a Python function, and the objects that its names mean. It can be pickled."""

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self.source, self.names = source, names
        self.run = self._compiled()

    @classmethod
    def of(cls, graph: fx.Graph) -> Program:
        """Returns the program of a graph."""
        made = graph.python_code("self")
        return cls(made.src, made.globals)

    def _compiled(self) -> Callable[..., Any]:
        space = dict(self.names)
        exec(compile(self.source, "<a piece of the model's graph>", "exec"), space)
        run: Callable[..., Any] = space[NAME]
        return run

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "names": {name: _packed(value) for name, value in self.names.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.source, self.names = state["source"], {name: _unpacked(value) for name, value in state["names"].items()}
        self.run = self._compiled()


def _packed(value: Any) -> Any:
    if isinstance(value, ModuleType):
        return ("module", value.__name__)
    if isinstance(value, torch._ops.OpOverload):
        return ("op", str(value))
    return ("value", value)


def _unpacked(packed: Any) -> Any:
    match packed:
        case ("module", name):
            return __import__(name, fromlist=[""])
        case ("op", name):
            found: Any = torch.ops
            for part in name.split("."):
                found = getattr(found, part)
            return found
    return packed[1]


@dataclass(frozen=True)
class Computation:
    """Holds what a piece does in one mode."""

    program: Program
    handed: dict[int, int]  # outputs that are inputs as they came, which nothing else uses: output -> input
    weights: frozenset[int]  # inputs that are parameters of earlier pieces: they are never written to
    own: dict[int, str] = field(default_factory=dict)  # outputs that are parameters of the piece: output -> name


class Segment(nn.Module):
    """Runs a piece in the mode that it is in. Parts and parameters have their names in the model, which are no name of its own attributes.

    The first tensor of its output is the one that a head goes on from.
    """

    def __init__(self, parts: Mapping[str, Any], pieces: Mapping[bool, Computation]) -> None:
        super().__init__()
        self._delock_pieces = dict(pieces)
        self._delock_place = torch.device("cpu")
        for path, part in parts.items():
            put(self, path, part)

    def forward(self, given: Value) -> Value:
        made: tuple[Tensor, ...] = self._delock_pieces[self.training].program.run(self, *tensors(given))
        return made[0] if len(made) == 1 else made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Segment:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._delock_place = fn(torch.empty(0, device=self._delock_place)).device  # where new tensors are made
        return self


def computation(piece: Segment, mode: bool) -> Computation:
    """Returns what a piece does in a mode."""
    return piece._delock_pieces[mode]


def put(root: nn.Module, path: str, part: Any) -> None:
    """Puts a module, a parameter or a buffer under its path; what is above it becomes a module without a forward."""
    *above, last = path.split(".")
    for name in above:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    if isinstance(part, nn.Parameter):
        root.register_parameter(last, part)
    elif isinstance(part, nn.Module):
        root.add_module(last, part)
    else:
        tensor, persistent = part
        root.register_buffer(last, tensor, persistent=persistent)


def as_number(tensor: Tensor) -> int:
    """Returns a size that has travelled as a tensor."""
    return int(tensor)


def as_size(tensor: Tensor) -> torch.Size:
    """Returns sizes that have travelled as a tensor."""
    return torch.Size(tensor.tolist())


def as_tensor(number: Any) -> Tensor:
    """Returns a size, or several, as a tensor that can travel."""
    return torch.tensor(number, dtype=torch.int64)
