"""The first fetch of a ring's backward, ahead of the ring.

Of a body, the graph of one ring, what starts the first hops and waits for them is cut
off. A graph with several rings then has the start of each before the body of the one
before it, and the waits before its own body. Invariant: hops keep their order on all
ranks, as rings stand in the order of the graph; and two of one tag are never under way
at once, as a ring's fetch starts behind the waits of the ring before.
"""

from collections.abc import Mapping
from itertools import takewhile

from torch.fx import Graph, GraphModule, Node

from ringcompile import ops
from ringcompile.lowering.heads import Head, cut_off, find_ancestors
from ringcompile.torch_private import WAIT_TENSOR


def split_first_fetch(body: GraphModule) -> Head | None:
    """Cut the first hops and their waits off a ring's graph.

    Args:
        body: of one ring; it gets what the hops bring as placeholders behind its own.

    Returns:
        What was cut off; None, and the body as it was, if nothing is fetched first.
    """
    waits = _find_first_waits(body.graph)
    return cut_off(body, waits, "fetched") if waits else None


def _find_first_waits(graph: Graph) -> list[Node]:
    """Those of the hops that start before anything is waited for."""
    waits = graph.find_nodes(op="call_function", target=WAIT_TENSOR)
    hops = graph.find_nodes(op="call_function", target=ops.HOP)
    if not waits or not hops:
        return []
    order = {node: n for n, node in enumerate(graph.nodes)}
    first = {hop for hop in hops if order[hop] < order[waits[0]]}
    of_first = [wait for wait in waits if find_ancestors([wait]) & first]
    later = set(hops) - first
    return [wait for wait in of_first if find_ancestors([wait]).isdisjoint(later)]


def fetch_early(
    graph: Graph, heads: Mapping[Node, Head], *, is_ahead: bool = True
) -> dict[Node, list[Node]]:
    """Write heads into a graph of rings, each start as early as it may be.

    Args:
        graph: of forward or backward.
        heads: of rings in it, as ``split_first_fetch`` cuts them.
        is_ahead: whether starts may stand ahead of other rings, and of what else comes
            before their own. Not where Inductor may cut CUDA graphs in between: what
            one starts it has to wait for.

    Returns:
        For each ring what its body reads beside its operands.
    """
    rings = [node for node in graph.nodes if node in heads]
    copies: dict[Node, dict[Node, Node]] = {}
    for n, ring in enumerate(rings):
        head = heads[ring]
        if ring not in copies:  # the first, or what it reads is made behind the last
            place = _find_place(graph, head, ring) if is_ahead else ring
            copies[ring] = head.write(ring, place, head.results)
        with graph.inserting_before(ring):
            for wait in head.results:
                copies[ring][wait] = graph.node_copy(wait, copies[ring].__getitem__)
        for following in rings[n + 1 : n + 2]:
            head = heads[following]
            if is_ahead and _is_ready(graph, head, following, ring):
                copies[following] = head.write(following, ring, head.results)
    return {ring: [copies[ring][w] for w in heads[ring].results] for ring in rings}


def _find_place(graph: Graph, head: Head, ring: Node) -> Node:
    """The first node before which all is there that a head reads."""
    needed = {*_read_by(head, ring), *graph.find_nodes(op="placeholder")}
    last = next(node for node in reversed(graph.nodes) if node in needed)
    following: Node = last.next
    return following


def _is_ready(graph: Graph, head: Head, ring: Node, before: Node) -> bool:
    """Whether all that a head reads is there before a node."""
    earlier = takewhile(lambda node: node is not before, graph.nodes)
    return _read_by(head, ring) <= set(earlier)


def _read_by(head: Head, ring: Node) -> set[Node]:
    """Which of a ring's operands its head reads."""
    return {operand for own, operand in head.match(ring).items() if own.users}
