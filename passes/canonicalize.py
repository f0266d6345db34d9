"""Spell a graph in fewer ways: no in-place ops on fresh memory, no einsum of pairs.

Invariant: the graph computes what it did, on the same memory or fresher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from ringcompile.passes.memory import find_base, find_written, writes_memory
from ringcompile.passes.op import Op, is_tensor, read_op, schema_of, shape_of
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
        functional = _find_functional(node)
        if functional is None or not _is_unseen(node, place):
            continue
        if _gives_the_same(node, functional):
            node.target = functional
            edits += 1
    return edits


def _find_functional(node: Node) -> OpOverload | None:
    """The op that returns what this in-place op writes."""
    target = node.target
    if not isinstance(target, OpOverload) or not writes_memory(node):
        return None
    namespace, _, name = schema_of(target).name.partition("::")
    if not name.endswith("_") or find_written(node) != [node.args[0]]:
        return None
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = target.name().partition(".")[2] or "default"
    functional = getattr(packet, overload, None)
    if not isinstance(functional, OpOverload):
        return None
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    same = _argument_names(target) == _argument_names(functional)
    return functional if same and not is_random else None


def _argument_names(op: OpOverload) -> list[str]:
    return [argument.name for argument in schema_of(op).arguments]


def _is_unseen(node: Node, place: dict[Node, int]) -> bool:
    """Whether the graph made the memory, and reads it later through ``node`` only."""
    base = find_base(node)
    if base.op != "call_function" or writes_memory(base):
        return False
    now = place[node]
    older = [n for n in place if place[n] < now and find_base(n) is base]
    return all(place[user] <= now for n in older for user in n.users)


def _gives_the_same(node: Node, functional: OpOverload) -> bool:
    """Whether shape and dtype stay, which an in-place op forces upon its result."""
    op, before = read_op(node), node.meta["val"]
    assert op is not None, "an in-place op is an op"
    args = op.with_slots([n.meta["val"] for n in op.slots])
    if any(isinstance(v, Node) for v in args.values()):
        return False
    result = functional(**args)
    return (
        isinstance(result, Tensor)
        and result.dtype == before.dtype
        and result.shape == before.shape
    )


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
            matmul = _call(aten.matmul.default, (left, right), like=node)
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
    return _call(aten.permute.default, (node, dims), like=like)


def _call(target: OpOverload, args: tuple[object, ...], *, like: Node) -> Node:
    """A new call with the meta of the node that it is for."""
    node = like.graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta.update(like.meta)
    values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    node.meta["val"] = target(*values)
    assert is_tensor(node), f"{target} gives one tensor"
    return node
