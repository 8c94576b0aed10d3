"""Cuts the graphs of a model into pieces: one module for what lies between two places where it can be cut."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from delock.errors import UsageError
from delock.nets.cut_point import cut_points
from delock.partition.graph.assembly import Source, assembled, of_model, tensors_of
from delock.partition.graph.guards import Guards
from delock.partition.graph.segment import PLACE, Computation, Program, Segment, as_number, as_size, as_tensor, put
from delock.partition.graph.traced import Traced
from delock.partition.graph.values import Line, blocks, calls, line, starts

ENOUGH = 12  # places to cut; finer ones are looked for only where there are fewer


class NoCutError(UsageError):
    """Raised if the model cannot be cut where it was asked for. unknown: there is no such place in any graph of the model."""

    def __init__(self, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.unknown = unknown


@dataclass(frozen=True)
class Piece:
    """Holds a piece: the module that it begins with, by path, and the piece as a module. The first piece begins with "".

    also: all modules that begin where it does, with CutPoints in front of them; ties: parameters of earlier pieces that it is sent,
    and their bytes; parts: where what it holds comes from, by its path in the piece.
    """

    begins: str
    module: Segment
    also: tuple[str, ...] = ()
    ties: tuple[tuple[str, int], ...] = ()
    parts: dict[str, Source] = field(default_factory=dict)


def pieces(
    traced: Traced, wanted: Sequence[str] = (), only: Collection[str] | None = None, enough: float = ENOUGH, least: int = 0
) -> list[Piece]:
    """Returns the pieces of a model.

    wanted: modules, by path, in front of which there must be a cut; only: all in front of which there may be one; enough: the number of
    cuts for which no finer places are looked for; least: that for which even single operations are cut apart, by their names in the graph.
    Raises NoCutError for a wanted one in front of which none is possible.
    """
    lines = {mode: line(traced, mode) for mode in traced.graphs}
    names, places, also = boundaries(traced, lines, wanted, only, enough, least)
    owned: set[int] = set()
    made = []
    for i, name in enumerate(["", *names]):
        between = {mode: (edges[i], edges[i + 1]) for mode, edges in places.items()}
        ties = _ties(traced, lines[True], places[True][i]) if i else ()
        parts = dict[str, Source]()
        module = _segment(traced, lines, between, owned, parts)
        made.append(Piece(name, module, also.get(name, ()), ties, parts))
    _leftover(traced.model, made)
    return made


def boundaries(
    traced: Traced, lines: dict[bool, Line], wanted: Sequence[str], only: Collection[str] | None, enough: float, least: int
) -> tuple[list[str], dict[bool, list[int]], dict[str, tuple[str, ...]]]:
    """Returns the modules in front of which the model is cut, the edges of the pieces in each graph, and other names of the same places."""
    marks = cut_points(traced.model)
    begun = {mode: starts(one, marks) for mode, one in lines.items()}
    ops = {mode: {node.name: i for i, node in enumerate(one.work)} for mode, one in lines.items()}
    for mode, known in begun.items():
        known |= {path: ops[mode][path] for path in wanted if path not in known and path in ops[mode]}
    for known in begun.values():
        known |= {path: first for path in wanted if path not in known and (first := _first_inside(path, known)) is not None}
    legal = {path: at for path in begun[True] if (at := _place(path, lines, begun))}
    for path in wanted:
        _refuse(path, traced, lines, begun, legal, marks)
    rank = dict.fromkeys(wanted, -2) | dict.fromkeys(marks, -1)  # of several that begin at one place, the coarsest gives the name
    chosen: list[str] = []
    for level, paths in enumerate(blocks(traced.model, begun[True])):
        for path in paths:
            rank.setdefault(path, level)
        chosen = _ordered({path: at for path, at in legal.items() if path in rank}, rank)
        if len(chosen) >= enough:
            break
    if len(chosen) < least:
        finer = {name: at for name in ops[True] if name not in legal and (at := _place(name, lines, ops))}
        legal |= finer
        chosen = _ordered(legal, {**dict.fromkeys(finer, len(legal)), **dict.fromkeys(begun[True], len(legal) - 1), **rank})
    there = [legal[path] for path in chosen]
    if lost := next((path for path in wanted if legal[path] not in there), None):
        raise NoCutError(
            f"the model cannot be cut in front of {lost}: its order among the others is another in training than in evaluation"
        )
    chosen = [path for path in chosen if only is None or path in only]
    edges = {mode: [0, *(legal[path][mode] for path in chosen), len(lines[mode].work)] for mode in lines}
    also = {path: tuple(other for other, at in legal.items() if at == legal[path]) for path in chosen}
    return chosen, edges, also


def _first_inside(path: str, begun: Mapping[str, int]) -> int | None:
    """Returns where the first part of a module begins that is not called itself, as a ModuleList."""
    return min((at for other, at in begun.items() if other.startswith(f"{path}.")), default=None)


def _place(path: str, lines: dict[bool, Line], begun: dict[bool, dict[str, int]]) -> dict[bool, int]:
    """Returns the place in front of a module in every graph, or nothing if one of them cannot be cut there."""
    if any(path not in begun[mode] for mode in lines):
        return {}
    places = {mode: begun[mode][path] for mode in lines}
    sent = all(at > 0 and not lines[mode].obstacle(at) for mode, at in places.items())
    return places if sent and not _in_both(lines, places) else {}


def _in_both(lines: dict[bool, Line], places: Mapping[bool, int]) -> str:
    """Returns a state that would belong to the piece in front of a place in one mode, and to that behind it in the other; "" for none."""
    sides: dict[str, set[bool]] = {}
    for mode, one in lines.items():
        for state, first in one.begins.items():
            sides.setdefault(state, set()).add(first < places[mode])
    return next((state for state, found in sides.items() if len(found) > 1), "")


def _refuse(
    path: str,
    traced: Traced,
    lines: dict[bool, Line],
    begun: dict[bool, dict[str, int]],
    legal: Mapping[str, object],
    marks: Sequence[str],
) -> None:
    """Raises NoCutError for a name in front of which no cut is possible, and for a CutPoint that stands in several places."""
    if path in legal:
        if path in marks and (count := max(calls(one, path) for one in lines.values())) > 1:
            raise NoCutError(f"the CutPoint {path} is called {count} times in a forward, but marks one place: use one for each place")
        return
    if not any(path in known for known in begun.values()):
        modules = dict(traced.model.named_modules())
        if path not in modules:
            near = difflib.get_close_matches(path, legal, n=1, cutoff=0)
            raise NoCutError(f"no module is called {path!r}" + (f": did you mean {near[0]!r}?" if near else ""), unknown=True)
        whole = next((str(n.target) for n in lines[True].work if n.op == "call_module" and path.startswith(f"{n.target}.")), "")
        why = f"it lies inside {whole}, which is called as a whole" if whole else "the forward does not call it"
        raise NoCutError(f"the model cannot be cut in front of {path}: {why}")
    raise NoCutError(f"the model cannot be cut in front of {path}: {_why(path, lines, begun)}")


def _why(path: str, lines: dict[bool, Line], begun: dict[bool, dict[str, int]]) -> str:
    if any(path not in begun[mode] for mode in lines):
        return "it takes part in training only, or in evaluation only"
    if any(begun[mode][path] == 0 for mode in lines):
        return "it is the first"
    if found := next((why for mode in lines if (why := lines[mode].obstacle(begun[mode][path]))), ""):
        return found
    state = _in_both(lines, {mode: begun[mode][path] for mode in lines})
    return f"{state} is first used on one side of it in training, and on the other in evaluation"


def _ties(traced: Traced, found: Line, place: int) -> tuple[tuple[str, int], ...]:
    """Returns the parameters that would cross a cut at a place, and their bytes."""
    weights = (traced.state(str(node.target)) for node in found.alive(place) if node.op == "get_attr")
    return tuple((traced.names[id(weight)], weight.nbytes) for weight in weights)


def _ordered(places: dict[str, dict[bool, int]], rank: Mapping[str, int]) -> list[str]:
    """Returns the paths in order, one for each place; where the graphs disagree about the order, the later one is left out."""
    found: list[str] = []
    for path, at in sorted(places.items(), key=lambda one: (one[1][True], rank[one[0]], -one[0].count("."))):
        before = places[found[-1]] if found else dict.fromkeys(at, 0)
        if all(at[mode] > before[mode] for mode in at):
            found.append(path)
    return found


def _segment(
    traced: Traced, lines: dict[bool, Line], between: dict[bool, tuple[int, int]], owned: set[int], parts: dict[str, Source]
) -> Segment:
    """Returns a piece as a module, and adds what it holds to `parts`. owned: tensors of earlier pieces, and then of this one."""
    does = {mode: _part(traced, lines[mode], *between[mode], parts, owned, traced.guards.get(mode)) for mode in lines}
    made = assembled(traced.model, parts, does)
    owned.update(id(one) for one in tensors_of(made))
    return made


def _part(
    traced: Traced, found: Line, begin: int, end: int, parts: dict[str, Source], owned: set[int], guards: Guards | None
) -> Computation:
    """Returns the computation of a piece, and adds what it needs to `parts`. owned: tensors of earlier pieces."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    last = end == len(found.work)
    entering = found.inputs if begin == 0 else found.main_first(found.alive(begin))
    leaving = list(found.output) if last else found.main_first(found.alive(end))
    for node in entering:
        env[node] = graph.placeholder(node.name)
    if begin == 0 and guards:
        graph.call_function(guards, tuple(env.values()))
    raw = dict(env)
    work = found.work[begin:end]
    needed = {one for node in work for one in node.all_input_nodes} | set(leaving)
    for node in entering:
        kind = found.facts.kinds.get(node.name)
        if kind in ("int", "size") and begin and node in needed:
            env[node] = graph.call_function(as_number if kind == "int" else as_size, (env[node],))
        elif begin and node in needed and node.name in found.facts.floats and node.name not in found.facts.learns:
            env[node] = graph.call_method("detach", (env[node],))  # as in the model: kernels differ where a gradient is asked for
    for node in sorted((n for n in needed if n.op == "get_attr"), key=lambda n: n.name):
        if found.travels.get(node, node) not in env:
            env[found.travels.get(node, node)] = _attribute(traced, graph, node, parts, owned, copied=node in found.copied)
        env[node] = env[found.travels.get(node, node)]
    for node in work:
        if node.op == "call_module":
            parts[str(node.target)] = str(node.target)
        env[node] = _moved(graph, node, env)
    out = []
    for node in leaving:
        if not last and found.facts.kinds.get(node.name) in ("int", "size"):
            out.append(raw[node] if node in raw and begin else graph.call_function(as_tensor, (env[node],)))
        else:
            out.append(env[node])
    graph.output(tuple(out))
    weights = frozenset(i for i, node in enumerate(entering) if node.op == "get_attr")
    if last:
        return Computation(Program.of(graph), {}, weights)
    handed = {j: entering.index(n) for j, n in enumerate(leaving) if n in raw and out[j] is raw[n] and len(raw[n].users) == 1}
    own = {j: str(one.target) for j, one in enumerate(out) if one.op == "get_attr"}
    idle = len(handed) + len(own) == len(out) or len(set(handed.values())) == len(entering)  # it would be left with no output or input
    return Computation(Program.of(graph), {}, weights) if idle else Computation(Program.of(graph), handed, weights, own)


def _moved(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    """Copies a node, with its device in place of one that tracing has written down."""
    new = graph.node_copy(node, lambda one: env[one])
    if any(isinstance(one, torch.device) for one in _constants((node.args, node.kwargs))):
        with graph.inserting_before(new):
            place = graph.create_node("get_attr", PLACE)
        new.args = map_aggregate(new.args, lambda one: place if isinstance(one, torch.device) else one)
        new.kwargs = map_aggregate(new.kwargs, lambda one: place if isinstance(one, torch.device) else one)
    return new


def _constants(tree: Any) -> list[Any]:
    found: list[Any] = []
    map_aggregate(tree, lambda one: found.append(one))
    return found


def _attribute(traced: Traced, graph: fx.Graph, node: fx.Node, parts: dict[str, Source], owned: set[int], *, copied: bool) -> fx.Node:
    """Returns a node that reads a parameter, buffer or constant of the piece, and adds that to `parts`."""
    path, value = str(node.target), traced.state(str(node.target))
    if not copied:
        path = traced.names[id(value)]
        parts[path] = path
        return graph.create_node("get_attr", path)
    if path in traced.constants or id(value) in owned:
        source = value if path in traced.constants else path
        path = f"copies.{path.replace('.', '_')}"
        parts[path] = source
    else:
        parts[path] = path
    return graph.create_node("get_attr", path)


def _leftover(model: nn.Module, made: Sequence[Piece]) -> None:
    """Gives state that no graph uses, and further names of what one does, to the piece with its like, by default the first."""
    homes = {id(one): piece for piece in made for one in tensors_of(piece.module)}
    there = {name for piece in made for name, _ in _named(piece.module)}
    for name, tensor in _named(model):
        if name in there:
            continue
        home = homes.get(id(tensor), made[0])
        home.parts[name] = name
        put(home.module, name, of_model(model, name, name))


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
