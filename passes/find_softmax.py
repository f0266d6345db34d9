"""Find softmaxes whose weights meet a V and whose scores come from a Q and a K.

Looks at the shape of the graph only; what the ops between do is read elsewhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from ringcompile.passes.coordinates import read_index_map
from ringcompile.passes.op import Op, is_tensor, read_op, shape_of
from ringcompile.passes.operands import CASTS, PRODUCTS, carries_sequence
from ringcompile.passes.read_softmax import Softmax, read_softmax
from ringcompile.passes.value_rules import RULES

aten = torch.ops.aten

_PRODUCTS = {*PRODUCTS, aten.einsum}
# Ops that a way from a product to a softmax, or from there to a product, may lead over.
_ON_THE_WAY = {*RULES, aten.dropout, aten.native_dropout, aten.constant_pad_nd}


@dataclass(frozen=True, slots=True)
class Spelled:
    """An attention spelled out.

    Attributes:
        softmax: its softmax.
        way_down: from Q.K to the softmax's scores, both included.
        outputs: products that the weights go into; ``P @ V`` if there is just one.
        way_out: ops on the weights before those products.
        strangers: other uses of the weights.
    """

    softmax: Softmax
    way_down: tuple[Node, ...]
    outputs: tuple[Node, ...]
    way_out: tuple[Node, ...]
    strangers: tuple[Node, ...]


def find_spelled(
    graph: Graph, sums: Mapping[Node, Node] | None = None
) -> Iterator[Spelled]:
    """Every softmax between two products whose scores run over tokens on both sides.

    Args:
        graph: the graph.
        sums: for products of each two elements the sums that are products of matrices.
    """
    sums = sums or {}
    for node in graph.nodes:
        softmax = read_softmax(node)
        if softmax is None:
            continue
        way_down = find_way_down(softmax.scores, sums)
        if way_down is None:
            continue
        outputs, way_out, strangers = _follow_weights(softmax.weights, sums)
        if outputs:
            yield Spelled(softmax, way_down, outputs, way_out, strangers)


# ---- up to Q.K -----------------------------------------------------------------------


def find_way_down(
    scores: Node, sums: Mapping[Node, Node] | None = None
) -> tuple[Node, ...] | None:
    """From the nearest product above, if its two sides are tokens, to the scores."""
    way = _find_product(scores, {}, sums or {})
    return way if way is not None and _is_over_tokens(way[0]) else None


def _find_product(
    node: Node, known: dict[Node, tuple[Node, ...] | None], sums: Mapping[Node, Node]
) -> tuple[Node, ...] | None:
    """The way from the nearest product to ``node``; None if there is none."""
    if node not in known:
        known[node] = None
        known[node] = _find_product_above(node, known, sums)
    return known[node]


def _find_product_above(
    node: Node, known: dict[Node, tuple[Node, ...] | None], sums: Mapping[Node, Node]
) -> tuple[Node, ...] | None:
    op = read_op(node)
    if op is None:
        return None
    if op.packet in _PRODUCTS or node in sums.values():
        return (node,)
    if not may_lead_on(op):
        return None
    # What only lends its shape or dtype, as in `view_as`, holds no scores.
    for slot in op.slots[:1] if moves_elements(op) else op.slots:
        way = _find_product(slot, known, sums)
        if way is not None:
            return (*way, node)
    return None


def may_lead_on(op: Op) -> bool:
    """Whether an op could stand between a product and a softmax."""
    target = op.node.target
    assert isinstance(target, OpOverload), "an Op calls a library op"
    return op.packet in _ON_THE_WAY or torch.Tag.pointwise in target.tags


def _is_over_tokens(product: Node) -> bool:
    op = read_op(product)
    assert op is not None, "a product is an op"
    if op.packet is aten.sum:
        op = read_op(op.slots[0])
        assert op is not None, "a sum of products"
    if op.packet in (aten.einsum, aten.mul):
        return all(
            any(carries_sequence(x, d) for d in range(len(shape_of(x))))
            for x in op.slots
        )
    q, k = op.slots[-2:]
    if len(shape_of(q)) == 1 or len(shape_of(k)) == 1:
        return False
    return carries_sequence(q, -2) and carries_sequence(k, -1)


# ---- down to P.V ---------------------------------------------------------------------


def _follow_weights(
    weights: Node, sums: Mapping[Node, Node]
) -> tuple[tuple[Node, ...], tuple[Node, ...], tuple[Node, ...]]:
    """Products that the weights go into, ops on the way, and other uses."""
    outputs, way_out, strangers = [], [], []
    work = [weights]
    while work:
        node = work.pop()
        for user in node.users:
            op = read_op(user)
            if user in sums or (op is not None and op.packet in _PRODUCTS):
                outputs.append(sums.get(user, user))
            elif op is not None and (
                (moves_elements(op) and op.slots[0] is node) or hides(op, node)
            ):
                way_out.append(user)
                work.append(user)
            elif user.op == "output" or is_tensor(user):
                strangers.append(user)
    if not outputs and any(_leads_to_product(s) for s in strangers):
        outputs = [next(s for s in strangers if _leads_to_product(s))]
    return tuple(outputs), tuple(way_out), tuple(strangers)


def hides(op: Op, node: Node) -> bool:
    """Whether an op puts zeros in some places of a float tensor."""
    if op.packet is aten.masked_fill:
        return op.args["self"] is node and _is_zero(op.args["value"])
    if op.packet is aten.where:
        branches = [op.args["self"], op.args["other"]]
        return node in branches and any(map(_is_zero, branches))
    return False


def _is_zero(argument: object) -> bool:
    return not isinstance(argument, Node) and argument == 0


def moves_elements(op: Op) -> bool:
    """Whether an op gives its operand's elements, moved, up to dropout and casts."""
    if not is_tensor(op.node) or not op.node.meta["val"].is_floating_point():
        return False
    return op.packet in (*CASTS, aten.dropout) or read_index_map(op) is not None


def _leads_to_product(node: Node) -> bool:
    work, seen = [node], set()
    while work:
        n = work.pop()
        op = read_op(n)
        if n in seen or op is None:
            continue
        seen.add(n)
        if op.packet in _PRODUCTS:
            return True
        if may_lead_on(op):
            work += n.users
    return False
