"""Writes to a part of fresh memory, spelt as new values.

``h[:, 0] = x`` writes to a view of ``h``, and readers of ``h`` see it. On shards the
view may be a value of its own, so the write is spelt as the ``h`` that is read later.
"""

from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from ringcompile.passes.functional import call_like, find_functional
from ringcompile.passes.memory import find_base, find_written, writes_memory
from ringcompile.passes.op import read_op

aten = torch.ops.aten

_SCATTERS = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
}


@dataclass(frozen=True, slots=True)
class _Write:
    """A write to a view.

    Attributes:
        node: the op in place.
        base: the value that made the memory.
        views: from the base's first view to the one that is written.
    """

    node: Node
    base: Node
    views: tuple[Node, ...]


def write_through_views(graph: Graph) -> int:
    """Replace writes to views where only the whole is read afterwards."""
    edits = 0
    for node in list(graph.nodes):
        write = _read_write(node) if writes_memory(node) else None
        if write is None or not _is_read_whole(write, graph):
            continue
        value = _write_value(write)
        if value is None:
            continue
        _replace(write, value)
        edits += 1
    return edits


def _read_write(node: Node) -> _Write | None:
    if not node.args or find_written(node) != [node.args[0]]:
        return None
    target = node.args[0]
    assert isinstance(target, Node), "what is written is a value"
    base = find_base(target)
    views: list[Node] = []
    while target is not base:
        if target.target not in _SCATTERS:
            return None
        views.insert(0, target)
        target = target.all_input_nodes[0]
    is_fresh = base.op == "call_function" and not writes_memory(base)
    return _Write(node, base, tuple(views)) if views and is_fresh else None


def _is_read_whole(write: _Write, graph: Graph) -> bool:
    """Whether only the base and the written part are read after the write."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    now = place[write.node]
    older = [
        n
        for n in graph.nodes
        if place[n] < now and n is not write.base and find_base(n) is write.base
    ]
    return all(place[user] <= now for n in older for user in n.users)


def _write_value(write: _Write) -> Node | None:
    """What the written part holds after the write."""
    node, view = write.node, write.views[-1]
    value, graph = view.meta["val"], node.graph
    target = node.target
    assert isinstance(target, OpOverload), "what writes memory is an op"
    op = read_op(node)
    assert op is not None, "what writes memory is an op"
    with graph.inserting_before(node):
        if target.overloadpacket in (aten.copy_, aten.fill_) and len(op.slots) > 1:
            source = op.slots[1]
            cast = call_like(node, aten.to.dtype, source, value.dtype)
            if any(isinstance(size, torch.SymInt) for size in value.shape):
                return call_like(node, aten.expand_as.default, cast, view)
            return call_like(node, aten.expand.default, cast, [*value.shape])
        if target.overloadpacket in (aten.fill_, aten.zero_):
            number = op.args.get("value", 0)
            return call_like(node, aten.full_like.default, view, number)
        functional = find_functional(node)
        if functional is None:
            return None
        return call_like(node, functional, *node.args, **node.kwargs)


def _replace(write: _Write, value: Node) -> None:
    """Put the written part into each whole that it is a view of, up to the base."""
    node, graph = write.node, write.node.graph
    before = {n for n in write.base.users if n is not node}
    with graph.inserting_before(node):
        part = value
        for view in reversed(write.views):
            whole = view.all_input_nodes[0]
            scatter = _SCATTERS[view.target]  # type: ignore[index]
            part = call_like(node, scatter, whole, part, *view.args[1:])
    node.replace_all_uses_with(value)
    earlier = _nodes_until(node)
    write.base.replace_all_uses_with(
        part, delete_user_cb=lambda user: user in before and user not in earlier
    )
    graph.erase_node(node)


def _nodes_until(last: Node) -> set[Node]:
    found = set()
    for node in last.graph.nodes:
        found.add(node)
        if node is last:
            break
    return found
