"""Traces a model by torch.fx: modules of torch.nn, and others without parts, stay modules, so that dropout and batch norm keep their modes.

A module whose forward cannot be traced stays whole as well, and is called as it is.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from delock.data.call import Call
from delock.partition.graph.generators import Generators, line_that_draws
from delock.partition.graph.refusals import DrawnError, InnerGradientError
from delock.partition.graph.root import MODEL, in_mode, root
from delock.partition.graph.structure import Structure
from delock.partition.graph.traceable import lengths, own_gradients, transforms_ended, unpack_at_once

ATTEMPTS = 40


class Tracer(fx.Tracer):
    """Traces down to modules of torch.nn and modules without parts.

    whole: paths of further modules that are called as they are; opened: of modules that are traced into nevertheless. `failed`: the
    innermost module in which tracing has failed.
    """

    proxy_buffer_attributes = True

    def __init__(self, whole: set[str], opened: set[str], draws: Generators) -> None:
        super().__init__()
        self.whole, self.opened, self.failed, self.draws = whole, opened, "", draws

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Returns True for a module that is called as it is."""
        path = module_qualified_name
        if path in self.opened or (path == MODEL and m._modules):
            return False
        return path in self.whole or not m._modules or of_torch(m) or isinstance(m, torch.jit.ScriptModule)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Notes an operation. To take a gradient is to fail."""
        if target is torch.autograd.grad or (kind, target) == ("call_method", "backward"):
            raise InnerGradientError
        return super().create_proxy(kind, target, *args, **kwargs)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Traces a call, and notes the innermost module in which it fails. To draw at random is to fail."""
        self._refuse_drawn()  # by the caller
        try:
            made = super().call_module(m, forward, args, kwargs)
            self._refuse_drawn()
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise
        return made

    def _refuse_drawn(self) -> None:
        if self.draws.moved():
            raise DrawnError


def of_torch(module: nn.Module) -> bool:
    """Returns True for a module of torch.nn and for one made from it, as timm's batch norm with an activation."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return any(base.__module__.startswith("torch.nn.modules") and base is not nn.Module for base in type(module).__mro__)


def symbolic(model: nn.Module, call: Call, count: int) -> tuple[dict[bool, fx.Graph], dict[str, Tensor], Structure]:
    """Returns the graphs of both modes, constants, and the structure of the output. Raises whatever tracing raises."""
    opened: set[str] = set()
    graphs, constants, structure = _both(model, call, count, opened)
    if shared := tied(model, graphs[True]):
        opened = {f"{MODEL}.{path}" for path in shared}
        try:
            graphs, constants, structure = _both(model, call, count, opened)
        except Exception:  # they stay modules, and no cut can come between them
            return graphs, constants, structure
    return graphs, constants, structure


def _both(model: nn.Module, call: Call, count: int, opened: set[str]) -> tuple[dict[bool, fx.Graph], dict[str, Tensor], Structure]:
    graphs: dict[bool, fx.Graph] = {}
    constants: dict[str, Tensor] = {}
    for mode in (True, False):
        graphs[mode], found, structure = _traced(model, call, count, opened, mode)
        for target, value in found.items():
            constants[f"{target}_{mode}"] = value
    return graphs, constants, structure


def _traced(model: nn.Module, call: Call, count: int, opened: set[str], training: bool) -> tuple[fx.Graph, dict[str, Tensor], Structure]:
    """Returns the graph of one mode. Modules that cannot be traced are kept whole, one after the other."""
    whole: set[str] = set()
    while True:
        under = root(in_mode(model, training), call, count, lambda one: isinstance(one, Tensor | fx.Proxy))
        tracer = Tracer(whole, opened, draws := Generators(under))
        try:
            graph = _run(tracer, under, training)
            unpack_at_once(graph)
            break
        except Exception as error:
            if tracer.failed in ("", MODEL) or len(whole) == ATTEMPTS or tracer.failed in opened | whole:
                if isinstance(error, DrawnError):
                    error.place = line_that_draws(draws, partial(_run, Tracer(whole, opened, draws), under, training))
                raise
            whole.add(tracer.failed)
    return graph, _strip(graph, under, training), under.structure


def _run(tracer: Tracer, under: nn.Module, training: bool) -> fx.Graph:
    with torch.set_grad_enabled(training), transforms_ended(), lengths(), own_gradients():
        return tracer.trace(under)


def _strip(graph: fx.Graph, under: nn.Module, training: bool) -> dict[str, Tensor]:
    """Names targets by their paths in the model; returns the constants that the tracer has put aside."""
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "call_module" or (node.op == "get_attr" and node.target.startswith(f"{MODEL}.")):
            node.target = node.target.removeprefix(f"{MODEL}.")
        elif node.op == "get_attr":
            constants[node.target] = getattr(under, node.target)
            node.target = f"{node.target}_{training}"
    return constants


def tied(model: nn.Module, graph: fx.Graph) -> set[str]:
    """Returns the paths of modules that share a parameter with another part of the graph, as each called twice does."""
    users: dict[int, list[str]] = defaultdict(list)  # parameter -> modules, once per call; "" for one that is used directly
    for node in graph.nodes:
        if node.op == "call_module":
            for weight in model.get_submodule(node.target).parameters():
                users[id(weight)].append(node.target)
        elif node.op == "get_attr" and node.target in dict(model.named_parameters(remove_duplicate=False)):
            users[id(model.get_parameter(node.target))].append("")
    return {path for paths in users.values() if len(paths) > 1 for path in paths if path}
