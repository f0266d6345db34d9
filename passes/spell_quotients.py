"""Divide the weights of an attention, not its result: ``(e @ v) / sum`` anew.

Invariant: the graph computes what it did, up to rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from sympy import Expr
from torch.fx import Graph, Node

from ringcompile.passes.coordinates import align
from ringcompile.passes.find_softmax import find_way_down
from ringcompile.passes.functional import call_like
from ringcompile.passes.memory import find_base, find_mutated
from ringcompile.passes.op import Op, read_op, shape_of
from ringcompile.passes.read_softmax import (
    KEY,
    Total,
    follow_views,
    known_sizes,
    read_exp,
    read_total,
)
from ringcompile.passes.symbolic import Size, index_symbol

aten = torch.ops.aten

_PAIR = 2


@dataclass(frozen=True, slots=True)
class _Quotient:
    """``(e @ v) / e.sum(keys)``, each up to views.

    Attributes:
        exps: what is summed.
        total: its sum.
        moved: views of ``exps`` up to the product, first one first.
        product: ``e @ v``.
        after: views of it up to the division.
    """

    exps: Node
    total: Total
    moved: tuple[Node, ...]
    product: Node
    after: tuple[Node, ...]


def spell_quotients(graph: Graph) -> int:
    """Divide weights before they meet V; return the number of edits."""
    mutated = find_mutated(graph)
    edits = 0
    for node in list(graph.nodes):
        op = read_op(node)
        if op is None or op.packet is not aten.div:
            continue
        found = next(_read_quotients(op), None)
        if found is None or any(
            find_base(n) in mutated for n in _list_read(found, node)
        ):
            continue
        _divide_first(node, found)
        edits += 1
    return edits


def _list_read(found: _Quotient, division: Node) -> set[Node]:
    nodes = [found.exps, *found.moved, found.product, *found.after, *found.total.inside]
    return {*nodes, *(m for n in (*nodes, division) for m in n.all_input_nodes)}


def _read_quotients(op: Op) -> Iterator[_Quotient]:
    if len(op.slots) != _PAIR or op.args.get("rounding_mode") is not None:
        return
    numerator, denominator = op.slots
    shape = shape_of(op.node)
    if len(shape_of(numerator)) != len(shape) or len(shape_of(denominator)) > len(
        shape
    ):
        return
    after: list[Node] = []
    here = align(shape_of(numerator), [index_symbol(d) for d in range(len(shape))])
    for node, index in follow_views(numerator, here, known_sizes(shape)):
        product = read_op(node)
        if product is not None and product.packet in (aten.matmul, aten.bmm):
            for exps, total, moved in _read_weights(product, index, denominator, shape):
                yield _Quotient(exps, total, moved, node, tuple(after[::-1]))
            return
        after.append(node)


def _read_weights(
    product: Op, index: Sequence[Expr], denominator: Node, shape: Sequence[Size]
) -> Iterator[tuple[Node, Total, tuple[Node, ...]]]:
    """Exps of a product whose sums over keys stand where the product's rows do."""
    if any(len(shape_of(x)) < _PAIR for x in product.slots):
        return
    *lead, row, column = index
    for operand, matrix in zip(product.slots, ([row, KEY], [KEY, column]), strict=True):
        moved: list[Node] = []
        at = align(shape_of(operand), [*lead, *matrix])
        for exps, place in follow_views(operand, at, known_sizes(shape)):
            total = read_total(denominator, exps, shape)
            if total is not None and _is_beside(total, place):
                softmax = read_exp(exps, total.dim)
                if softmax is not None and find_way_down(softmax.scores) is not None:
                    yield exps, total, tuple(moved[::-1])
            moved.append(exps)


def _is_beside(total: Total, place: Sequence[Expr]) -> bool:
    """Whether each result is divided by the sum of the exps that it was made with."""
    rows = [e for d, e in enumerate(place) if d != total.dim]
    sums = [e for d, e in enumerate(total.index) if d != total.dim]
    return place[total.dim] == KEY and rows == sums


def _divide_first(division: Node, found: _Quotient) -> None:
    graph, exps, total = division.graph, found.exps, found.total
    with graph.inserting_before(division):
        sums = call_like(exps, aten.sum.dim_IntList, exps, [total.dim], True)
        if total.more is not None:
            sums = call_like(sums, aten.add.Tensor, sums, total.more)
        new = {exps: call_like(division, aten.div.Tensor, exps, sums)}
        for node in (*found.moved, found.product, *found.after):
            new[node] = graph.node_copy(node, lambda n: new.get(n, n))
    last = (exps, *found.moved, found.product, *found.after)[-1]
    division.replace_all_uses_with(new[last])
    graph.erase_node(division)
