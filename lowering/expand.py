"""Rings written out, once AOTAutograd has cut the graph into forward and backward.

Until then a ring is one op in each, so no pass over the joint graph walks through it
and none can move it or save what it fetches. Rings that say the same are traced once
and, where Inductor can call a graph, compiled once; lists of blocks, of a mask that all
of them read, are made once. What backward computes first it has to fetch, so that hop
starts before the ring does: ahead of the ring before it, under which it flies.
Invariant: the tags of hops are told by the plans of a graph alone, which are alike on
all ranks, and their order by whether CUDA graphs may be cut in between too; how rings
are compiled, strides and settings decide as well.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from types import MappingProxyType

from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ringcompile import ops
from ringcompile.inductor_passes import (
    OWN_MEMORY,
    call_graph,
    pass_over,
    trace_graph,
)
from ringcompile.ir.text import rename_plan
from ringcompile.lowering.exchange import exchange
from ringcompile.lowering.fetch_early import fetch_early, split_first_fetch
from ringcompile.lowering.heads import Head, find_operands
from ringcompile.lowering.hops import SHARED
from ringcompile.lowering.program import read_plan
from ringcompile.lowering.ring import attend_ring, find_ring_gradients
from ringcompile.lowering.share_lists import share_lists, split_lists
from ringcompile.plan.backward import fetches_first

_LOOPS: Mapping[Callable[..., object] | str, Callable[..., list[Tensor]]] = (
    MappingProxyType(
        {
            ops.RING_FORWARD: attend_ring,
            ops.RING_BACKWARD: find_ring_gradients,
            ops.EXCHANGE: exchange,
        }
    )
)
COMMUNICATING = (ops.HOP, ops.ALL_GATHER, ops.ALL_REDUCE)


def expand_rings(graph: Graph, *, can_call: bool, may_be_cut: bool = False) -> None:
    """Replace every ring op by what it does.

    Args:
        graph: of forward or backward, with fake values.
        can_call: whether rings that are alike may become calls of one graph; else each
            of them is written out.
        may_be_cut: whether the graph may be cut in CUDA graphs: then what a ring
            fetches first starts with the ring, not before the ring before it.
    """
    alike: dict[tuple[object, ...], list[Node]] = {}
    counts: Counter[tuple[object, ...]] = Counter()
    for op in _LOOPS:
        for node in graph.find_nodes(op="call_function", target=op):
            alike.setdefault(_describe(node), []).append(node)
            counts[_describe_plan(node)] += 1
    bodies: list[GraphModule] = []
    fetches: dict[Node, Head] = {}
    lists: dict[Node, Head] = {}
    for nodes in alike.values():
        plan = str(nodes[0].kwargs["plan"])
        if counts[_describe_plan(nodes[0])] > 1:
            plan = rename_plan(plan, SHARED, "one of several attentions")
        body = _trace(nodes[0], plan)
        bodies.append(body)
        is_backward = nodes[0].target is ops.RING_BACKWARD
        if is_backward and fetches_first(read_plan(plan).schedule):
            head = split_first_fetch(body)
            fetches |= {} if head is None else dict.fromkeys(nodes, head)
        if len(nodes) > 1:
            head = split_lists(body)
            lists |= {} if head is None else dict.fromkeys(nodes, head)
    shared = share_lists(graph, lists)
    fetched = fetch_early(graph, fetches, is_ahead=not may_be_cut)
    given = {n: [*fetched.get(n, ()), *shared.get(n, ())] for n in fetched | shared}
    for nodes, body in zip(alike.values(), bodies, strict=True):
        if can_call and len(nodes) > 1 and _is_fixed(nodes[0]):
            _call(graph, nodes, body, given)
        else:
            _write_out(graph, nodes, body, given)


def communicates(module: GraphModule) -> bool:
    """Whether a graph, or one that it calls, starts communication."""
    graphs = (m.graph for m in module.modules() if isinstance(m, GraphModule))
    return any(node.target in COMMUNICATING for g in graphs for node in g.nodes)


def _describe(node: Node) -> tuple[object, ...]:
    """Equal iff one graph does what both do; which attention it is does not count."""
    args, kwargs = map_arg((node.args, dict(node.kwargs)), _describe_value)
    return node.target, repr(args), repr(kwargs | {"plan": _plan_of_any(node)})


def _describe_plan(node: Node) -> tuple[object, ...]:
    """Equal iff hops of both are of the same kind and plan."""
    return node.target, node.kwargs.get("kind"), _plan_of_any(node)


def _plan_of_any(node: Node) -> str:
    """Its plan, whichever attention it is."""
    return rename_plan(str(node.kwargs["plan"]), SHARED, "")


def _describe_value(node: Node) -> str:
    x = node.meta["val"]
    if not isinstance(x, Tensor):
        return str(x)
    return f"{tuple(x.shape)} {x.stride()} {x.storage_offset()} {x.dtype} {x.device}"


def _is_fixed(node: Node) -> bool:
    """Whether all it reads are tensors whose sizes are numbers."""
    values = [n.meta["val"] for n in find_operands(node)]
    return not any(
        isinstance(size, SymInt)
        for x in values
        for size in ((*x.shape, *x.stride()) if isinstance(x, Tensor) else (x,))
    )


def _trace(node: Node, plan: str) -> GraphModule:
    """What a ring does under ``plan``, of what it reads."""

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        left = iter(values)
        args, kwargs = map_arg(
            (node.args, dict(node.kwargs)),
            lambda _: next(left),
        )
        return tuple(_LOOPS[node.target](*args, **(kwargs | {"plan": plan})))

    return trace_graph(run, [n.meta["val"] for n in find_operands(node)])


# ---- calls ---------------------------------------------------------------------------


def _call(
    graph: Graph,
    nodes: Sequence[Node],
    body: GraphModule,
    given: Mapping[Node, Sequence[Node]],
) -> None:
    body.meta[OWN_MEMORY] = True
    pass_over(body)
    name = _add_child(graph, "shared_ring", body)
    for node in nodes:
        values = [*find_operands(node), *given.get(node, ())]
        with graph.inserting_before(node):
            child = graph.get_attr(name)
        # The same node, so that Inductor does not find the values of all that follows
        # anew.
        node.args, node.kwargs = (child, name, *values), {}
        node.target = call_graph
        node.meta.pop("eager_input_vals", None)  # the ring's, not the call's


def _add_child(graph: Graph, name: str, child: object) -> str:
    """Give the graph's module an attribute; returns its name, which is a free one."""
    module = graph.owning_module
    assert module is not None, "a graph that Inductor lowers has a module"
    n = 0
    while hasattr(module, f"{name}_{n}"):
        n += 1
    setattr(module, f"{name}_{n}", child)
    return f"{name}_{n}"


# ---- copies --------------------------------------------------------------------------


def _write_out(
    graph: Graph,
    nodes: Sequence[Node],
    body: GraphModule,
    given: Mapping[Node, Sequence[Node]],
) -> None:
    children = {
        n.target: _add_child(graph, str(n.target), getattr(body, str(n.target)))
        for n in body.graph.find_nodes(op="get_attr")
    }
    for node in nodes:
        # Of the node as it is now: a ring before it may have been written out since.
        values = [*find_operands(node), *given.get(node, ())]
        with graph.inserting_before(node):
            results = _copy(graph, body.graph, node, values, children)
        for item in list(node.users):
            assert item.target is getitem, "of a list one takes items"
            item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]
            graph.erase_node(item)
        graph.erase_node(node)


def _copy(
    graph: Graph,
    body: Graph,
    ring: Node,
    operands: Sequence[Node],
    children: Mapping[object, str],
) -> list[Node]:
    placeholders = body.find_nodes(op="placeholder")
    copies = dict(zip(placeholders, operands, strict=True))
    for node in body.nodes:
        if node.op == "output":
            results = map_arg(node.args[0], copies.__getitem__)
            return list(results)
        if node.op == "placeholder":
            continue
        copy = graph.node_copy(node, copies.__getitem__)
        if node.op == "get_attr":
            copy.target = children[node.target]
        copy.meta["stack_trace"] = ring.meta.get("stack_trace")
        copies[node] = copy
    raise AssertionError("a graph has an output")
