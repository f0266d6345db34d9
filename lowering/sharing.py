"""Rings that are equal, as calls of one graph, so that Inductor compiles it once.

While a ring is traced its ops are marked. Of the graph that Inductor is about to lower,
the marked parts that say the same, tags apart, become calls of one shared body; a ring
without an equal stays as it is. Invariants: no result of a body lies in the memory of
an operand or of another result, as Inductor takes for granted of such calls; and no
ring moves past other communication.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.traceback import annotate

from ringcompile import ops
from ringcompile.inductor_passes import OWN_MEMORY, sort_nodes
from ringcompile.lowering.hops import Tag
from ringcompile.torch_private import WAIT_TENSOR

SHARED = "shared_ring"

# Torch copies forward's marks onto backward nodes beside them, and lets them win.
_MARKS = ("ringcompile.backward", "ringcompile.forward")
_SAME_MEMORY = (ops.KEEP, ops.TOUCH, WAIT_TENSOR)  # as they are lowered
_TAG = [a.name for a in ops.HOP._schema.arguments].index("tag")  # noqa: SLF001


def mark_ring(attention: int, *, backward: bool = False) -> AbstractContextManager[Any]:
    """Mark what is traced inside as one direction of one ring."""
    return annotate({_MARKS[not backward]: attention})


def share_rings(graph: Graph) -> None:
    """Replace rings that are equal by calls of one body.

    Args:
        graph: a functional graph with fake values, whose module gets the bodies.
    """
    module = graph.owning_module
    assert module is not None, "a graph that Inductor lowers has a module"
    equal: dict[str, list[_Region]] = {}
    for region in _find_regions(graph):
        equal.setdefault(region.text, []).append(region)
    for regions in equal.values():
        if len(regions) == 1:
            continue
        name = _free_name(module)
        body = GraphModule({}, _build_body(regions[0]))
        body.meta[OWN_MEMORY] = True
        setattr(module, name, body)
        for region in regions:
            _replace(graph, region, name)
    sort_nodes(graph)


def communicates(module: GraphModule) -> bool:
    """Whether a graph, or one that it calls, starts or ends communication."""
    graphs = (m.graph for m in module.modules() if isinstance(m, GraphModule))
    return any(_communicates(node) for graph in graphs for node in graph.nodes)


@dataclass(frozen=True)
class _Region:
    """One direction of one ring, as a part of a graph.

    Attributes:
        nodes: in order; those without operands are copies of what all rings may share.
        operands: what they read.
        results: those of them that others read.
    """

    nodes: tuple[Node, ...]
    operands: tuple[Node, ...]
    results: tuple[Node, ...]

    @cached_property
    def text(self) -> str:
        """Equal iff one body computes both."""
        names: dict[Node, str] = {n: f"a{i}" for i, n in enumerate(self.operands)}
        names |= {n: f"x{i}" for i, n in enumerate(self.nodes)}
        lines = [f"{names[n]}: {_describe(n.meta['val'])}" for n in self.operands]
        for node in self.nodes:
            args = map_arg(_without_attention(node), names.__getitem__)
            kwargs = map_arg(node.kwargs, names.__getitem__)
            lines.append(f"{names[node]} = {node.target} {args} {kwargs}")
        return "\n".join([*lines, *map(names.__getitem__, self.results)])


def _describe(x: Tensor) -> tuple[object, ...]:
    return (*(tuple(x.shape), x.stride(), x.storage_offset()), x.dtype, x.device)


def _without_attention(node: Node) -> tuple[Any, ...]:
    """Arguments in which a tag says that its attention is one of several."""
    if node.target is not ops.HOP:
        return node.args
    args = list(node.args)
    args[_TAG] = Tag.decode(args[_TAG]).as_shared().encode()  # type: ignore[arg-type]
    return tuple(args)


# ---- which parts ---------------------------------------------------------------------


def _find_regions(graph: Graph) -> Iterator[_Region]:
    order = {node: i for i, node in enumerate(graph.nodes)}
    nodes = list(order)
    marked: dict[tuple[str, int], list[Node]] = {}
    for node in nodes:
        if mark := _mark_of(node):
            marked.setdefault(mark, []).append(node)
    constants = _find_constants(nodes)
    for mark, found in marked.items():
        own = [n for n in found if n not in constants]
        if not own:
            continue
        span = nodes[order[own[0]] : order[own[-1]] + 1]
        members = _close(own, span) - constants
        if any(_mark_of(n) not in {None, mark} for n in members):
            continue
        members = _leave_views(members, span)
        region = _build_region(members, span, constants)
        if _is_sharable(region, span):
            yield region


def _mark_of(node: Node) -> tuple[str, int] | None:
    marks = node.meta.get("custom", {})
    found = [(name, marks[name]) for name in _MARKS if name in marks]
    return found[0] if found and node.op == "call_function" else None


def _find_constants(nodes: Sequence[Node]) -> set[Node]:
    """What is computed from nothing; torch lets all layers read the first one's."""
    constants: set[Node] = set()
    for node in nodes:
        if (
            node.op == "call_function"
            and isinstance(node.target, OpOverload)
            and torch.Tag.nondeterministic_seeded not in node.target.tags
            and not node.is_impure()
            and constants.issuperset(node.all_input_nodes)
        ):
            constants.add(node)
    return constants


def _close(own: Sequence[Node], span: Sequence[Node]) -> set[Node]:
    """With those that lie between two of its own, which some pass has put there."""
    members, after, before = set(own), set[Node](), set[Node]()
    for node in span:
        if any(n in members or n in after for n in node.all_input_nodes):
            after.add(node)
    for node in reversed(span):
        if any(n in members or n in before for n in node.users):
            before.add(node)
    return members | (after & before)


def _leave_views(members: set[Node], span: Sequence[Node]) -> set[Node]:
    """Without views of operands that others read: those stay outside."""
    outside = set[Node]()
    for node in span:
        if node not in members or members.issuperset(node.users):
            continue
        chain = [node]
        while (source := _memory_of(chain[-1])) is not None and source in members:
            chain.append(source)
        if source is not None:
            outside.update(chain)
    return members - outside


def _memory_of(node: Node) -> Node | None:
    """Whose memory the result lies in; None if in its own."""
    source: object = None
    if node.target in _SAME_MEMORY:
        source = node.args[0]
    elif node.target is getitem:
        whole = node.args[0]
        assert isinstance(whole, Node), "an item of what is computed"
        source = whole if _memory_of(whole) is not None else None
    elif isinstance(node.target, OpOverload):
        schema = node.target._schema  # noqa: SLF001 - torch has no other name for it
        if any(x.alias_info is not None for x in schema.returns):
            source = node.args[0]
    return source if isinstance(source, Node) else None


def _build_region(
    members: set[Node], span: Sequence[Node], constants: set[Node]
) -> _Region:
    inside: dict[Node, None] = {}

    def put(node: Node) -> None:
        """Behind the constants that it reads, wherever those are computed now."""
        for n in node.all_input_nodes:
            if n in constants and n not in inside:
                put(n)
        inside[node] = None

    for node in span:
        if node in members:
            put(node)
    read = (n for node in inside for n in node.all_input_nodes)
    operands = dict.fromkeys(n for n in read if n not in inside)
    results = (n for n in inside if n in members and set(n.users) - inside.keys())
    return _Region(tuple(inside), tuple(operands), tuple(results))


def _is_sharable(region: _Region, span: Sequence[Node]) -> bool:
    inside = set(region.nodes)
    return (
        any(map(_communicates, inside))
        and not any(_communicates(n) for n in span if n not in inside)
        and all(_is_plain(n.target) for n in inside)
        and all(_is_fixed(n.meta.get("val")) for n in (*region.operands, *inside))
        and all(isinstance(n.meta["val"], Tensor) for n in region.operands)
        and all(isinstance(n.meta["val"], Tensor) for n in region.results)
        and _has_own_memory(region)
    )


def _has_own_memory(region: _Region) -> bool:
    """Whether each result lies in memory of its own."""
    homes = [_home_of(n) for n in region.results]
    # Inductor computes what is joined right where the whole will be.
    joined = [n for n in region.nodes if n.target is torch.ops.aten.cat.default]
    inputs = {_home_of(x) for n in joined for x in n.all_input_nodes}
    own = set(homes) & set(region.nodes) - inputs
    return len(own) == len(homes)


def _home_of(node: Node) -> Node:
    """The node whose own memory the result lies in."""
    while (source := _memory_of(node)) is not None:
        node = source
    return node


def _communicates(node: Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    return target in ops.COMMUNICATING or target.namespace.startswith("_c10d")


def _is_plain(target: object) -> bool:
    """Whether a call reads its arguments and writes nothing."""
    if not isinstance(target, OpOverload):
        return target is getitem
    return not target._schema.is_mutable  # noqa: SLF001


def _is_fixed(value: object) -> bool:
    """Whether all sizes are numbers."""
    values = value if isinstance(value, list | tuple) else [value]
    for x in values:
        if isinstance(x, Tensor):
            sizes: tuple[object, ...] = (*x.shape, *x.stride(), x.storage_offset())
            if any(isinstance(n, SymInt) for n in sizes):
                return False
        elif not isinstance(x, int | None):  # kernels for GPUs give those too
            return False
    return True


# ---- calls in their place ------------------------------------------------------------


def _free_name(module: torch.nn.Module) -> str:
    n = 0
    while hasattr(module, f"{SHARED}_{n}"):
        n += 1
    return f"{SHARED}_{n}"


def _build_body(region: _Region) -> Graph:
    body = Graph()
    copies: dict[Node, Node] = {}
    for n, operand in enumerate(region.operands):
        copies[operand] = body.placeholder(f"operand_{n}")
        copies[operand].meta["val"] = operand.meta["val"]
    for node in region.nodes:
        copy = body.node_copy(node, copies.__getitem__)
        copy.args = map_arg(_without_attention(node), copies.__getitem__)
        copies[node] = copy
    results = body.output(tuple(copies[n] for n in region.results))
    results.meta["user_visible_output_idxs"] = []  # any strides will do
    return body


def _replace(graph: Graph, region: _Region, name: str) -> None:
    call_graph: Callable[..., object] = torch.ops.higher_order.invoke_subgraph
    with graph.inserting_after(region.nodes[-1]):  # a constant is never the last
        body = graph.get_attr(name)
    with graph.inserting_after(body):
        call = graph.call_function(call_graph, (body, name, *region.operands))
    call.meta["val"] = tuple(n.meta["val"] for n in region.results)
    inside = set(region.nodes)
    for n, result in enumerate(region.results):
        with graph.inserting_after(call):
            item = graph.call_function(getitem, (call, n))
        item.meta = dict(result.meta)
        result.replace_all_uses_with(item, lambda user: user not in inside)
    for node in reversed(region.nodes):
        if not node.users:
            graph.erase_node(node)
