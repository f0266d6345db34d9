"""Spell a graph in fewer ways: no in-place ops on fresh memory, no einsum of pairs.

Invariant: the graph computes what it did, on the same memory or fresher.
"""

from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from ringcompile.passes.functional import call_like, find_functional
from ringcompile.passes.memory import find_base, writes_memory
from ringcompile.passes.op import Op, read_op, shape_of
from ringcompile.passes.view_writes import write_through_views
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten


def canonicalize(gm: GraphModule) -> int:
    """Rewrite ``gm`` in place; return the number of edits."""
    edits = write_through_views(gm.graph) + _make_functional(gm.graph)
    edits += _spell_einsums(gm.graph)
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


# ---- einsum --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Product:
    """An einsum of two tensors as one matrix product.

    Attributes:
        left: order of the first operand's dims as ``(batch, row, inner)``.
        right: order of the second operand's dims as ``(batch, inner, column)``.
        result: order of the product's dims in the einsum's result.
    """

    left: list[int]
    right: list[int]
    result: list[int]


def _spell_einsums(graph: Graph) -> int:
    """Write einsums with one row, one column and one inner index as ``matmul``."""
    edits = 0
    for node in graph.find_nodes(op="call_function", target=aten.einsum.default):
        op = read_op(node)
        product = _read_einsum(op) if op is not None else None
        if op is None or product is None:
            continue
        with graph.inserting_before(node):
            left = _permute(op.slots[0], product.left, like=node)
            right = _permute(op.slots[1], product.right, like=node)
            matmul = call_like(node, aten.matmul.default, left, right)
            result = _permute(matmul, product.result, like=node)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        edits += 1
    return edits


def _read_einsum(op: Op) -> _Product | None:
    inputs, arrow, out = op.args["equation"].replace(" ", "").partition("->")
    first, comma, second = inputs.partition(",")
    if not (arrow and comma) or "." in inputs or "," in second:
        return None
    terms = (first, second, out)
    if any(len(set(term)) != len(term) for term in terms) or op.args["path"]:
        return None
    batch = [i for i in first if i in second and i in out]
    inner = [i for i in first if i in second and i not in out]
    row = [i for i in first if i not in second and i in out]
    column = [i for i in second if i not in first and i in out]
    if not len(inner) == len(row) == len(column) == 1:
        return None
    if set(first) | set(second) != {*batch, *inner, *row, *column}:
        return None
    if _broadcasts(op, first, second):
        return None
    return _Product(
        [first.index(i) for i in (*batch, *row, *inner)],
        [second.index(i) for i in (*batch, *inner, *column)],
        [(*batch, *row, *column).index(i) for i in out],
    )


def _broadcasts(op: Op, first: str, second: str) -> bool:
    """Whether a shared index has two sizes, as einsum allows for size 1."""
    left, right = map(shape_of, op.slots)
    return not all(
        sizes_equal(left[first.index(i)], right[second.index(i)])
        for i in first
        if i in second
    )


def _permute(node: Node, dims: list[int], *, like: Node) -> Node:
    if dims == sorted(dims):
        return node
    return call_like(like, aten.permute.default, node, dims)
