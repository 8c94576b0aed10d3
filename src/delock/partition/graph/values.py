"""The order of a graph's work, and the values alive between any two places in it: what a stage would have to send."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from delock.partition.graph.traced import Seen, Traced, path_of

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Line:
    """Holds one graph as a line of work. A place is an index of `work`: a cut there comes before it.

    A parameter that several places use is a value from its first use on, and travels like any other. Buffers that nobody writes, and
    constants, are copied to where they are used.
    """

    graph: fx.Graph
    facts: Seen
    inputs: list[fx.Node]
    work: list[fx.Node]  # all but inputs, attributes and the output
    output: tuple[fx.Node, ...]
    travels: dict[fx.Node, fx.Node] = field(default_factory=dict)  # attribute -> the first attribute with the same parameter
    copied: set[fx.Node] = field(default_factory=set)  # attributes that are copied to every stage that needs them
    span: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)  # of a value: the place that makes it, the last that uses it
    closed: dict[str, tuple[int, int]] = field(default_factory=dict)  # state -> no cut can come behind the first place, up to the second
    begins: dict[str, int] = field(default_factory=dict)  # state -> the place of its first use: the piece there has it

    def __post_init__(self) -> None:
        self.numbers = {node: i for i, node in enumerate(self.graph.nodes)}

    def alive(self, place: int) -> list[fx.Node]:
        """Returns the values made before a place and used from it on, in the order in which they are made."""
        return [node for node, (made, last) in self.span.items() if made < place <= last]

    def obstacle(self, place: int) -> str:
        """Returns why there can be no cut in front of a place; "" if all alive there can be sent, and is the same behind the cut."""
        for state, (first, last) in self.closed.items():
            if first < place <= last:
                return f"{state} is used on both sides of it, and the two stages would have different ones"
        alive, kinds = self.alive(place), self.facts.kinds
        if other := next((node for node in alive if kinds.get(node.name, "tensor") == "other"), None):
            return f"{_said(other)} is in use there, and it is neither a tensor nor a size"
        if gaps := next((node for node in alive if node.name in self.facts.strided), None):
            return f"{_said(gaps)} is in use there, whose elements do not fill its memory"
        if not any(kinds.get(node.name) == "tensor" and node.name in self.facts.floats for node in alive):
            return "no floating tensor is in use there"
        if torn := self._torn(alive, place):
            return f"{_said(torn[0])} and {_said(torn[1])} share memory that is written to behind it"
        return ""

    def _torn(self, alive: list[fx.Node], place: int) -> list[fx.Node]:
        """Returns values that share memory which is written to later: sent, they would share none."""
        shared: dict[int, list[fx.Node]] = defaultdict(list)
        for node in alive:
            if at := self.facts.storage.get(node.name):
                shared[at].append(node)
        begin = self.numbers[self.work[place]]
        found = (own for at, own in shared.items() if len(own) > 1 and any(i >= begin for i in self.facts.writes.get(at, ())))
        return next(found, [])

    def main_first(self, alive: list[fx.Node]) -> list[fx.Node]:
        """Returns the values with the main activation in front and sizes at the end: the newest floating tensor that no parameter is."""
        floats = [n for n in alive if n.name in self.facts.floats and n.op != "get_attr"]
        main = max(floats, key=lambda n: self.span[n][0], default=None)
        tensors = [n for n in alive if self.facts.kinds.get(n.name) == "tensor" and n is not main]
        return [*([main] if main else []), *tensors, *(n for n in alive if self.facts.kinds.get(n.name) != "tensor")]


def line(traced: Traced, mode: bool) -> Line:
    """Returns the graph of a mode as a line."""
    graph, facts = traced.graphs[mode], traced.facts[mode]
    nodes = list(graph.nodes)
    output = next(node for node in nodes if node.op == "output")
    work = [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")]
    found = Line(graph, facts, [n for n in nodes if n.op == "placeholder"], work, tuple(output.args[0]))
    places = {node: i for i, node in enumerate(work)}
    end = len(work)

    def uses(node: fx.Node) -> list[int]:
        return [places.get(user, end) for user in node.users]

    parameters, first = {id(p) for p in traced.model.parameters()}, dict[int, fx.Node]()
    buffers: dict[int, list[int]] = defaultdict(list)
    names = {name for one in traced.facts.values() for name in one.written}  # in either mode
    written = {id(b) for name, b in traced.model.named_buffers() if name in names}
    spans: dict[fx.Node, list[int]] = defaultdict(list)
    for node in nodes:
        if node.op != "get_attr" or not node.users:
            continue
        value = traced.state(str(node.target))
        if id(value) in parameters:
            owner = first.setdefault(id(value), node)
            found.travels[node] = owner
            spans[owner] += uses(node)
        else:
            found.copied.add(node)
            if id(value) in written:
                buffers[id(value)] += uses(node)
    _close_modules(traced.model, work, places, spans, first, buffers, written)
    for node, at in spans.items():
        found.span[node] = min(at), max(at)
    for node in found.inputs:
        found.span[node] = -1, max(uses(node), default=-1)
    for node in work:
        found.span[node] = places[node], max(uses(node), default=-1)
    found.span = dict(sorted(found.span.items(), key=lambda one: one[1][0]))
    names_of = {id(t): name for name, t in reversed([*traced.model.named_parameters(), *traced.model.named_buffers()])}
    found.begins = {names_of[key]: min(at) for key, at in [*buffers.items(), *((key, spans[node]) for key, node in first.items())]}
    found.closed = {names_of[key]: (min(at), max(at)) for key, at in buffers.items() if len(set(at)) > 1} | _mapped(work)
    return found


def _mapped(work: list[fx.Node]) -> dict[str, tuple[int, int]]:
    """Returns the places between which torch.func.vmap is active: its levels are begun and ended by operations of their own."""
    found, begun = dict[str, tuple[int, int]](), list[int]()
    for place, node in enumerate(work):
        name = getattr(node.target, "__name__", "")
        if name.endswith("vmap_increment_nesting"):
            begun.append(place)
        elif name.endswith("vmap_decrement_nesting") and begun:
            found[f"a level of vmap ({len(found)})"] = begun.pop(), place
    return found


def _close_modules(
    model: nn.Module,
    work: list[fx.Node],
    places: dict[fx.Node, int],
    spans: dict[fx.Node, list[int]],
    first: dict[int, fx.Node],
    closed: dict[int, list[int]],
    written: set[int],
) -> None:
    """Notes, for state that whole modules use beside others, between which places no cut can come."""
    for node in work:
        if node.op != "call_module":
            continue
        module = model.get_submodule(str(node.target))
        for tensor in (*module.parameters(), *(b for b in module.buffers() if id(b) in written)):
            closed[id(tensor)].append(places[node])
    for key, node in first.items():
        if key in closed:  # a parameter of a module that is also used directly
            closed[key] += spans[node]


def starts(found: Line, marks: Collection[str] = ()) -> dict[str, int]:
    """Returns the place at which each module of the model begins, by path. marks: CutPoints; what follows one begins in front of it."""
    begun: dict[str, int] = {}
    front, marked = 0, False
    for place, node in enumerate(found.work):
        front = front if marked else place
        for path in path_of(node):
            begun.setdefault(path, front)
        marked = of_mark(node, marks)
    return begun


def of_mark(node: fx.Node, marks: Collection[str]) -> bool:
    """Returns True for what a CutPoint computes, and for what is taken out of its tuple."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return of_mark(node.args[0], marks)
    paths = path_of(node)
    return bool(paths) and paths[-1].partition("@")[0] in marks


def calls(found: Line, mark: str) -> int:
    """Returns how often a CutPoint is called, one after the other."""
    there = [of_mark(node, (mark,)) for node in found.work]
    return sum(now and not before for before, now in zip([False, *there], there, strict=False))


def blocks(model: nn.Module, begun: dict[str, int]) -> Iterator[list[str]]:
    """Yields the modules in front of which one may cut, coarse first: children of lists and sequences and their neighbours, then deeper."""
    depth = 1
    while True:
        found = [path for path in begun if 0 < _nesting(model, path) <= depth]
        yield found
        if not any(_nesting(model, path) > depth for path in begun):
            break
        depth += 1
    yield list(begun)


def _nesting(model: nn.Module, path: str) -> int:
    """Returns in how many containers a module lies, if it is a child of one or stands beside one; else 0."""
    parts = path.split(".")
    above = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    inside = sum(isinstance(one, CONTAINERS) for one in above)
    if isinstance(above[-1], CONTAINERS):
        return inside
    return inside + 1 if any(isinstance(one, CONTAINERS) for one in above[-1].children()) else 0


def _said(node: fx.Node) -> str:
    """Returns what an error calls a value."""
    if node.op == "placeholder":
        return f"the input {node.name}"
    if node.op == "get_attr":
        return str(node.target)
    paths = path_of(node)
    return f"{node.name}, made in {paths[-1] if paths else 'the forward of the model itself'},"
