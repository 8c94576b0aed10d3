"""A model as graphs, one in training mode and one in eval mode, and the facts about their values that cutting needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from delock.errors import UsageError
from delock.partition.graph.guards import Guards
from delock.partition.graph.structure import Structure
from delock.tensors import address, fills_memory, kind, same, tree_tensors

Kind = Literal["tensor", "int", "size", "other"]


@dataclass
class Traced:
    """Holds the graphs of a model. Targets of get_attr and call_module are paths in the model, or names of constants.

    graphs: by mode, True for training; inputs are tensors, and the output is a tuple of them, as `structure` has it.
    """

    model: nn.Module
    graphs: dict[bool, fx.Graph]
    constants: dict[str, Tensor]
    structure: Structure
    guards: dict[bool, Guards] = field(default_factory=dict)
    facts: dict[bool, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {id(weight): name for name, weight in self.model.named_parameters()}  # the first name of each

    def state(self, path: str) -> Any:
        """Returns a parameter, buffer, module or constant."""
        return self.constants[path] if path in self.constants else lookup(self.model, path)

    def checksum(self) -> int:
        """Returns a number that tells the code of the graphs from that of others."""
        return crc32("".join(graph.python_code("self").src for _, graph in sorted(self.graphs.items())).encode())


@dataclass
class Seen:
    """Holds what one run of a graph has shown of its values."""

    kinds: dict[str, Kind] = field(default_factory=dict)  # of every node, by name
    storage: dict[str, int] = field(default_factory=dict)  # address of its memory
    floats: set[str] = field(default_factory=set)  # names of floating tensors
    learns: set[str] = field(default_factory=set)  # of these, those that need a gradient
    strided: set[str] = field(default_factory=set)  # of these, those whose elements do not fill their memory: sent, they would be others
    writes: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))  # address -> indices of the nodes that write there
    written: set[str] = field(default_factory=set)  # paths of buffers that the run changed


def lookup(model: nn.Module, path: str) -> Any:
    """Returns the attribute at a path: a parameter, a buffer or a module."""
    owner, _, last = path.rpartition(".")
    return getattr(model.get_submodule(owner), last)


def path_of(node: fx.Node) -> tuple[str, ...]:
    """Returns the paths of the modules that the node is a part of, the outermost first; the model itself is left out."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else "" for entry in stack.values()]
    return tuple(p.removeprefix("model.") for p in paths if p.startswith("model."))


def observe(model: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Seen:
    """Runs a graph once, on a model that may be written to, and returns what was seen."""
    facts = Seen()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, value in constants.items():
        model.__dict__[name] = value
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(model.training):
        made = _Watching(model, graph, facts).run(*(x.clone() for x in inputs))
    if not all(isinstance(one, Tensor) for one in made):
        raise UsageError(f"the graph returns {kind(made)}, and only tensors can leave it")
    now = dict(model.named_buffers())
    facts.written = {name for name, was in before.items() if not same(now.get(name), was)}
    return facts


class _Watching(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph, facts: Seen) -> None:
        super().__init__(model, graph=graph)
        self.facts, self.index = facts, {node: i for i, node in enumerate(graph.nodes)}

    def run_node(self, n: fx.Node) -> Any:
        given = [one for one in _values(n, self.env) if one.layout == torch.strided]
        before = [(one, one._version) for one in given]
        value = super().run_node(n)
        for one, was in before:
            if one._version != was:
                self.facts.writes[address(one)].add(self.index[n])
        self.facts.kinds[n.name] = kind_of(value)
        if isinstance(value, Tensor):
            self.facts.storage[n.name] = address(value)
            if value.is_floating_point() or value.is_complex():
                self.facts.floats.add(n.name)
            if value.requires_grad:
                self.facts.learns.add(n.name)
                if not fills_memory(value.shape, value.stride()):
                    self.facts.strided.add(n.name)
        return value


def _values(node: fx.Node, env: Mapping[fx.Node, Any]) -> Iterator[Tensor]:
    found: list[Any] = []
    map_arg((node.args, node.kwargs), lambda one: found.append(env.get(one)))
    yield from tree_tensors(found)


def kind_of(value: object) -> Kind:
    """Returns the way in which a value can cross a cut; "other": it cannot."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, torch.Size):
        return "size"
    return "int" if isinstance(value, int | torch.SymInt) and not isinstance(value, bool) else "other"
