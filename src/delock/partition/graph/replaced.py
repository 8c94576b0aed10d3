"""Lets a graph read buffers as they were before its forward replaced them: a backward needs them so."""

from __future__ import annotations

import torch
from torch import fx

COPY, DETACH, CLONE = torch.ops.aten.copy_.default, torch.ops.aten.detach.default, torch.ops.aten.clone.default


def read_before_written(graph: fx.Graph) -> None:
    """Gives all who read a buffer that is written at the end of the graph a copy of it, and writes it as soon as its new value is there.

    So the graph can be cut behind it.
    """
    places = {node: i for i, node in enumerate(graph.nodes)}
    for write in _last(graph):
        buffer, value = write.all_input_nodes
        made = value.all_input_nodes[0] if value.target is DETACH else value
        readers = sorted((one for one in buffer.users if one is not write), key=lambda one: places[one])
        if not readers:
            continue
        with graph.inserting_before(readers[0]):
            copied = graph.call_function(CLONE, (buffer,))
        copied.meta = dict(readers[0].meta)
        for one in readers:
            one.replace_input_with(buffer, copied)
        for one in (write, value) if made.op not in ("placeholder", "get_attr") else ():
            if one is not made:
                one.meta = made.meta
                made.append(one)


def _last(graph: fx.Graph) -> list[fx.Node]:
    """Returns the nodes that write buffers, behind which there are no others."""
    found: list[fx.Node] = []
    for node in list(reversed(graph.nodes))[1:]:
        if node.target not in (COPY, DETACH):
            break
        if node.target is COPY and len(node.all_input_nodes) == 2 and node.all_input_nodes[0].op == "get_attr":
            found.append(node)
    return found
