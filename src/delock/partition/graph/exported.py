"""Traces a model by torch.export, down to single operations: for models whose forward asks for sizes, types and options of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind

from delock.data.call import Call
from delock.errors import UsageError
from delock.partition.graph.root import MODEL, root, shadow
from delock.partition.graph.structure import Structure
from delock.partition.graph.traced import Guard

CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")  # said by Guard instead


def exported(
    model: nn.Module, call: Call, inputs: Sequence[Tensor], rows: int
) -> tuple[dict[bool, fx.Graph], dict[str, Tensor], Structure, tuple[Guard, ...]]:
    """Returns the graphs of both modes, constants, the structure of the output, and the sizes for which the graphs hold.

    rows: samples in the inputs; at least two, because a size of one is taken for fixed. Raises whatever torch.export raises.
    """
    graphs: dict[bool, fx.Graph] = {}
    constants: dict[str, Tensor] = {}
    for mode in (True, False):
        own = shadow(model)
        if not mode:
            own.eval()
        under = root(own, call, len(inputs))
        program = _program(under, inputs, rows)
        graphs[mode], guards = _graph(program, constants, mode)
    return graphs, constants, under.structure, guards


def _program(under: nn.Module, inputs: Sequence[Tensor], rows: int) -> Any:
    """Exports with free sizes of batches, and of sequences where that is possible."""
    wide = [
        {0: Dim.AUTO, 1: Dim.AUTO} if one.dim() > 1 and not one.is_floating_point() and one.shape[1] > 1 else _free(one, rows)
        for one in inputs
    ]
    narrow = [_free(one, rows) for one in inputs]
    for shapes in [wide, narrow] if wide != narrow else [narrow]:
        try:
            return torch.export.export(under, tuple(inputs), dynamic_shapes={f"x{i}": one for i, one in enumerate(shapes)}, strict=False)
        except Exception:
            if shapes == narrow:
                raise
    raise AssertionError


def _free(one: Tensor, rows: int) -> dict[int, Any]:
    return {0: Dim.AUTO} if one.dim() and len(one) == rows else {}


def _graph(program: Any, constants: dict[str, Tensor], mode: bool) -> tuple[fx.Graph, tuple[Guard, ...]]:
    """Returns the program's graph with weights and buffers as attributes of the model, and the sizes of its inputs."""
    graph: fx.Graph = program.graph
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    guards = []
    for spec in program.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            shape = node.meta["val"].shape
            guards.append(Guard(tuple(size if isinstance(size, int) else str(size) for size in shape)))
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            _as_attribute(graph, node, spec.target.removeprefix(f"{MODEL}."))
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            name = f"constant_{len(constants)}_{mode}"
            constants[name] = program.constants[spec.target]
            _as_attribute(graph, node, name)
        else:
            raise UsageError(f"torch.export gives the model an input of kind {spec.kind}")
    for spec in program.graph_signature.output_specs:
        if spec.kind.name != "USER_OUTPUT":
            raise UsageError(f"torch.export gives the model an output of kind {spec.kind}")
    for node in reversed(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "").split(".")[0] in CHECKS:
            graph.erase_node(node)
    return graph, tuple(guards)


def _as_attribute(graph: fx.Graph, node: fx.Node, target: str) -> None:
    with graph.inserting_before(node):
        new = graph.create_node("get_attr", target, name=f"{node.name}_")
    node.replace_all_uses_with(new)
    graph.erase_node(node)
