"""Ops that repeat, unbind, index or scatter along some dims and pass the others."""

import torch

from ringcompile.passes.dims import Dims, Factors
from ringcompile.passes.op import Op, is_tensor, shape_of
from ringcompile.passes.rules.flow import Flow, Link
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten


def repeat(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Dims that are repeated once pass."""
    counts = op.args["repeats"]
    offset = len(counts) - len(operands[0])
    dims = list(factors.new_dims(shape_of(op.node)))
    links = set()
    for d, dim in enumerate(operands[0]):
        if counts[d + offset] == 1 and type(counts[d + offset]) is int:
            dims[d + offset] = dim
            links.add(Link(0, d, d + offset))
    return Flow(tuple(dims), frozenset(links))


def repeat_interleave(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """All dims pass but the one that is repeated."""
    if op.args.get("dim") is None or len(operands) != 1:
        return None
    at = op.args["dim"] % op.rank(0)
    dims = list(operands[0])
    dims[at] = factors.new(shape_of(op.node)[at])
    links = {Link(0, d, d) for d in range(op.rank(0)) if d != at}
    return Flow(tuple(dims), frozenset(links))


def unbind(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """One result for each index of a dim, which vanishes."""
    rank = op.rank(0)
    order = [d for d in range(rank) if d != op.args["dim"] % rank]
    links = {Link(0, d, i) for i, d in enumerate(order)}
    return Flow(tuple(operands[0][d] for d in order), frozenset(links))


def triangle(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """``tril`` and ``triu`` know their place in the last two dims only."""
    links = {Link(0, d, d) for d in range(op.rank(0) - 2)}
    return Flow(operands[0], frozenset(links))


def one_hot(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """A new last dim; without a number of classes it depends on all indices."""
    if op.args["num_classes"] == -1:
        return None
    links = {Link(0, d, d) for d in range(op.rank(0))}
    last = factors.new(shape_of(op.node)[-1])
    return Flow((*operands[0], last), frozenset(links))


def index_select(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """All dims pass but the one that is selected from."""
    at = op.args["dim"] % op.rank(0)
    dims = list(operands[0])
    dims[at] = factors.new(shape_of(op.node)[at])
    links = {Link(0, d, d) for d in range(op.rank(0)) if d != at}
    return Flow(tuple(dims), frozenset(links))


def index(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Dims without an index pass; those of the indices stand where the first did."""
    at = find_index_place(op)
    if at is None:
        return None
    place, indexed = at
    count = len(shape_of(op.node)) - (op.rank(0) - len(indexed))
    kept = [d for d in range(op.rank(0)) if d not in indexed]
    dims = list(factors.new_dims(shape_of(op.node)))
    links = set()
    for i, d in enumerate(kept):
        to = i if i < place else i + count
        dims[to] = operands[0][d]
        links.add(Link(0, d, to))
    return Flow(tuple(dims), frozenset(links))


def find_index_place(op: Op) -> tuple[int, tuple[int, ...]] | None:
    """Where the indices' dims stand in the result, and which dims are indexed.

    None where what is selected depends on data (bool masks).
    """
    indices = op.args["indices"]
    indexed = tuple(d for d, i in enumerate(indices) if i is not None)
    nodes = [indices[d] for d in indexed]
    if not nodes or any(
        not is_tensor(n) or n.meta["val"].dtype in (torch.bool, torch.uint8)
        for n in nodes
    ):
        return None
    adjacent = indexed == tuple(range(indexed[0], indexed[0] + len(indexed)))
    return (indexed[0] if adjacent else 0), indexed


def scatter(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Dims of which every row is scattered into itself pass."""
    shape = shape_of(op.node)
    at = op.args["dim"] % len(shape) if shape else 0
    links = set()
    for d, size in enumerate(shape):
        sizes = [shape_of(node)[d] for node in op.slots if len(shape_of(node))]
        if d != at and all(sizes_equal(size, other) for other in sizes):
            for slot, operand in enumerate(operands):
                factors.unite(operands[0][d], operand[d])
                links.add(Link(slot, d, d))
    return Flow(operands[0], frozenset(links))


def select_scatter(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """The source lacks the dim that is written to; the others pass."""
    rank = op.rank(0)
    at = op.args["dim"] % rank
    links = {Link(0, d, d) for d in range(rank) if d != at}
    links |= {Link(1, d - (d > at), d) for d in range(rank) if d != at}
    for d in range(rank):
        if d != at:
            factors.unite(operands[0][d], operands[1][d - (d > at)])
    return Flow(operands[0], frozenset(links))


def slice_scatter(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """All dims pass but the one that is written to."""
    at = op.args["dim"] % op.rank(0)
    links = set()
    for d in range(op.rank(0)):
        if d != at:
            factors.unite(operands[0][d], operands[1][d])
            links |= {Link(0, d, d), Link(1, d, d)}
    return Flow(operands[0], frozenset(links))


RULES = {
    aten.repeat: repeat,
    aten.repeat_interleave: repeat_interleave,
    aten.unbind: unbind,
    aten.tril: triangle,
    aten.triu: triangle,
    aten.one_hot: one_hot,
    aten.index_select: index_select,
    aten.index: index,
    aten.scatter: scatter,
    aten.scatter_add: scatter,
    aten.select_scatter: select_scatter,
    aten.slice_scatter: slice_scatter,
}
