"""Lists of blocks of a mask that tensors decide, made once for all rings of a graph.

What lists are made of hangs on positions and on what masks read, which the layers of a
model have in common. Of a body, the graph of rings that are alike, what makes them is
cut off; a graph has it once for all rings that read the same. Invariant: what is cut
off reads of queries, keys and values their sizes alone, and communicates nothing.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ringcompile import ops
from ringcompile.lowering.heads import Head, cut_off, find_ancestors

_SIZE = torch.ops.aten.sym_size.int


def split_lists(body: GraphModule) -> Head | None:
    """Cut what makes lists of blocks off the graph of rings.

    Args:
        body: it gets the lists as placeholders behind its own.

    Returns:
        What was cut off; None, and the body as it was, if there are no lists.
    """
    items = [
        item
        for lists in body.graph.find_nodes(op="call_function", target=ops.LIST_BLOCKS)
        if all(_is_of_mask(node) for node in _find_read(find_ancestors([lists])))
        for item in lists.users
    ]
    return cut_off(body, items, "list") if items else None


def _find_read(nodes: Iterable[Node]) -> list[Node]:
    """The placeholders of which some nodes read more than sizes."""
    of = dict.fromkeys(nodes)
    return [
        x
        for x in of
        if x.op == "placeholder"
        and any(user in of and user.target is not _SIZE for user in x.users)
    ]


def _is_of_mask(operand: Node) -> bool:
    """Whether masks read it: what they read are no real numbers."""
    value = operand.meta["val"]
    return not (isinstance(value, Tensor) and value.dtype.is_floating_point)


def share_lists(graph: Graph, heads: Mapping[Node, Head]) -> dict[Node, list[Node]]:
    """Write heads into a graph of rings, each once for all that read the same.

    Args:
        graph: of forward or backward.
        heads: of rings in it, as ``split_lists`` cuts them; those of one have operands
            of the same sizes.

    Returns:
        For each ring what its body reads beside its operands.
    """
    written: dict[tuple[object, ...], dict[Node, Node]] = {}
    shared: dict[Node, list[Node]] = {}
    for ring in [node for node in graph.nodes if node in heads]:
        head = heads[ring]
        operands = head.match(ring)
        read = _find_read(head.graph.nodes)
        key = (id(head), *(operands[node] for node in read))
        if key not in written:
            written[key] = head.write(ring, ring)
        shared[ring] = [written[key][node] for node in head.results]
    return shared
