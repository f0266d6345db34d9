"""Spell a graph in fewer ways: no in-place ops on fresh memory, one op for products.

Invariant: the graph computes what it did, on the same memory or fresher.
"""

import torch
from torch.fx import Graph, GraphModule, Node

from ringcompile.passes.functional import call_like, find_functional
from ringcompile.passes.memory import find_base, writes_memory
from ringcompile.passes.op import read_op, shape_of
from ringcompile.passes.spell_products import spell_products
from ringcompile.passes.spell_quotients import spell_quotients
from ringcompile.passes.view_writes import write_through_views

aten = torch.ops.aten


def canonicalize(gm: GraphModule) -> int:
    """Rewrite ``gm`` in place; return the number of edits."""
    edits = write_through_views(gm.graph) + _make_functional(gm.graph)
    edits += _spell_assignments(gm.graph)
    edits += spell_products(gm.graph) + spell_quotients(gm.graph)
    if edits:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return edits


# ---- in-place ops --------------------------------------------------------------------


def _make_functional(graph: Graph) -> int:
    """Replace ``x.add_(y)`` by ``x.add(y)`` where nobody sees ``x`` afterwards."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    edits = 0
    for node in list(graph.nodes):
        functional = find_functional(node)
        if functional is not None and _is_unseen(node, place):
            node.target = functional
            edits += 1
    return edits


def _is_unseen(node: Node, place: dict[Node, int]) -> bool:
    """Whether the graph made the memory, and reads it later through ``node`` only."""
    base = find_base(node)
    if base.op != "call_function" or writes_memory(base):
        return False
    now = place[node]
    older = [n for n in place if place[n] < now and find_base(n) is base]
    return all(place[user] <= now for n in older for user in n.users)


# ---- assignments by a mask -----------------------------------------------------------


def _spell_assignments(graph: Graph) -> int:
    """Write ``x[.., mask] = number`` as ``masked_fill``."""
    edits = 0
    for node in graph.find_nodes(op="call_function", target=aten.index_put.default):
        op = read_op(node)
        if op is None or op.args["accumulate"] or shape_of(op.args["values"]):
            continue
        indices = op.args["indices"]
        masks = [n for n in indices if n is not None]
        if len(masks) != 1 or masks[0].meta["val"].dtype is not torch.bool:
            continue
        first = indices.index(masks[0])
        behind = len(shape_of(node)) - first - len(shape_of(masks[0]))
        with graph.inserting_before(node):
            mask = masks[0]
            for _ in range(behind):
                mask = call_like(node, aten.unsqueeze.default, mask, -1)
            target, value = aten.masked_fill.Tensor, op.args["values"]
            filled = call_like(node, target, op.args["self"], mask, value)
        node.replace_all_uses_with(filled)
        graph.erase_node(node)
        edits += 1
    return edits
