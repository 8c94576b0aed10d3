"""Traces a model by torch.export, down to single operations: for models whose forward asks for sizes, types and options of its own."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind

from delock.data.call import Call
from delock.errors import UsageError
from delock.partition.graph.generators import Generators, line_that_draws
from delock.partition.graph.guards import Guards
from delock.partition.graph.refusals import DrawnError
from delock.partition.graph.regions import keep_regions
from delock.partition.graph.replaced import read_before_written
from delock.partition.graph.root import MODEL, in_mode, root
from delock.partition.graph.structure import Structure
from delock.partition.graph.traceable import lengths

CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")  # said by Guards instead


def exported(
    model: nn.Module, call: Call, examples: Sequence[Sequence[Tensor]], known: bool
) -> tuple[dict[bool, fx.Graph], dict[str, Tensor], Structure, dict[bool, Guards]]:
    """Returns the graphs of both modes, constants, the structure of the output, and the sizes for which the graphs hold.

    examples: tensors of batches of different sizes; sizes that differ are free. In the first batch none of these sizes is 1,
    because torch.export takes a 1 for fixed. known: the model learns that it is being exported; some compute in another way then. Raises
    whatever torch.export raises.
    """
    graphs: dict[bool, fx.Graph] = {}
    constants: dict[str, Tensor] = {}
    guards: dict[bool, Guards] = {}
    for mode in (True, False):
        under = root(in_mode(model, mode), call, len(examples[0]))
        under.writes = True
        with _quiet(), torch.set_grad_enabled(mode), answering(exporting=known), lengths():
            program = _program(under, examples)
        graphs[mode], guards[mode] = _graph(program, constants, mode)
    return graphs, constants, under.structure, guards


def _program(under: nn.Module, examples: Sequence[Sequence[Tensor]]) -> Any:
    """Exports with free sizes of batches, and of sequences where that is possible."""
    inputs, other = examples
    narrow = [_differing(one, two) for one, two in zip(inputs, other, strict=True)]
    wide = [{**free, 1: Dim.AUTO} if _is_sequence(one) else free for one, free in zip(inputs, narrow, strict=True)]
    for shapes in [wide, narrow] if wide != narrow else [narrow]:
        named = {f"x{i}": one for i, one in enumerate(shapes)}
        try:
            return _undrawn(under, partial(torch.export.export, under, tuple(inputs), dynamic_shapes=named, strict=False))
        except DrawnError:
            raise
        except Exception:
            if shapes == narrow:
                raise
    raise AssertionError


def _undrawn(under: nn.Module, export: Callable[[], Any]) -> Any:
    """Returns the program. Raises DrawnError if a generator has drawn meanwhile; what the program itself draws comes later."""
    draws = Generators(under)
    program = export()
    if draws.moved():
        raise DrawnError(line_that_draws(draws, export))
    return program


def _differing(one: Tensor, other: Tensor) -> dict[int, Any]:
    return {i: Dim.AUTO for i, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b}


def _is_sequence(one: Tensor) -> bool:
    return one.dim() > 1 and not one.is_floating_point() and one.shape[1] > 1


@contextlib.contextmanager
def answering(**known: bool) -> Iterator[None]:
    """Answers, within the block, models that ask torch.compiler if they are being exported or compiled."""
    before = {name: getattr(torch.compiler, f"is_{name}") for name in known}
    for name, answer in known.items():
        setattr(torch.compiler, f"is_{name}", partial(bool, answer))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch.compiler, f"is_{name}", function)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the whole graph, which torch.export prints when it fails; its error is raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _graph(program: Any, constants: dict[str, Tensor], mode: bool) -> tuple[fx.Graph, Guards]:
    """Returns the program's graph with weights and buffers as attributes of the model, and the sizes of its inputs."""
    graph: fx.Graph = program.graph
    keep_regions(graph, program.graph_module, 0 if mode else 50)
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    shapes: list[tuple[int | str, ...]] = []
    dtypes: list[torch.dtype] = []
    for spec in program.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            shapes.append(tuple(int(size) if size.isdecimal() else size for size in map(str, node.meta["val"].shape)))
            dtypes.append(node.meta["val"].dtype)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            _as_attribute(graph, node, spec.target.removeprefix(f"{MODEL}."))
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            name = f"constant_{len(constants)}_{mode}"
            constants[name] = program.constants[spec.target]
            _as_attribute(graph, node, name)
        else:
            raise UsageError(f"torch.export gives the model an input of kind {spec.kind}")
    if other := [spec.kind for spec in program.graph_signature.output_specs if spec.kind.name != "USER_OUTPUT"]:
        raise UsageError(f"torch.export gives the model an output of kind {other[0]}")
    for node in reversed(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "").split(".")[0] in CHECKS:
            graph.erase_node(node)
    read_before_written(graph)
    return graph, Guards(
        tuple(shapes), tuple(dtypes), *_conditions(list(placeholders.values()), program.range_constraints, {*chain(*shapes)})
    )


def _conditions(
    placeholders: Sequence[fx.Node], ranges: Any, sizes: Collection[int | str]
) -> tuple[dict[str, tuple[int, float]], tuple[str, ...]]:
    """Returns the ranges of sizes, and what tracing took for granted of them. Numbers that come from values have no range to check."""
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in placeholders)
    shapes = next((mode.shape_env for mode in modes if mode is not None and mode.shape_env is not None), None)
    known = {str(name): (int(found.lower), _number(found.upper)) for name, found in ranges.items() if str(name) in sizes}
    if shapes is None:
        return known, ()
    from torch.utils._sympy.printers import PythonPrinter

    printed = (PythonPrinter().doprint(shapes.simplify(guard.expr)) for guard in shapes.guards)  # sizes that are always equal have one name
    return known, tuple(dict.fromkeys(one for one in printed if one != "True"))


def _number(most: Any) -> float:
    return float(str(most)) if str(most).isdecimal() else float("inf")  # "int_oo"


def _as_attribute(graph: fx.Graph, node: fx.Node, target: str) -> None:
    with graph.inserting_before(node):
        new = graph.create_node("get_attr", target, name=f"{node.name}_")
    node.replace_all_uses_with(new)
    graph.erase_node(node)
