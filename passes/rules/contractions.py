"""Products: every dim passes but the one that is summed over."""

import torch

from ringcompile.passes.dims import Dims, Factors
from ringcompile.passes.op import Op, shape_of
from ringcompile.passes.rules.flow import Flow, Link
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten

_MATRIX = 2


def linear(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """``(..., I) x (O, I) + (O,)``."""
    if len(operands[1]) != _MATRIX:
        return None
    x, weight = operands[0], operands[1]
    factors.unite(weight[1], x[-1])
    last = len(x) - 1
    links = {Link(0, d, d) for d in range(last)} | {Link(1, 0, last)}
    if "bias" in op.slot_names:
        factors.unite(weight[0], operands[2][0])
        links.add(Link(2, 0, last))
    return Flow((*x[:-1], weight[0]), frozenset(links))


def matmul(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """``(..., I, C) x (..., C, J)``, leading dims broadcast."""
    return _product(op, factors, operands, slots=(0, 1))


def addmm(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """A product and a summand that broadcasts to it."""
    flow = _product(op, factors, operands, slots=(1, 2))
    if flow is None:
        return None
    offset = len(flow.dims) - len(operands[0])
    links = set(flow.links)
    sizes = shape_of(op.slots[0])
    for d, dim in enumerate(operands[0]):
        if not (isinstance(sizes[d], int) and sizes[d] == 1):
            factors.unite(flow.dims[d + offset], dim)
            links.add(Link(0, d, d + offset))
    return Flow(flow.dims, frozenset(links))


def _product(
    op: Op, factors: Factors, operands: list[Dims], *, slots: tuple[int, int]
) -> Flow | None:
    left, right = (operands[s] for s in slots)
    if min(len(left), len(right)) < _MATRIX:
        return None
    factors.unite(left[-1], right[-2])
    shape = shape_of(op.node)
    rank = len(shape)
    out = [*((),) * (rank - 2), left[-2], right[-1]]
    links = {
        Link(slots[0], len(left) - 2, rank - 2),
        Link(slots[1], len(right) - 1, rank - 1),
    }
    for slot, dims in zip(slots, (left, right), strict=True):
        sizes = shape_of(op.slots[slot])
        offset = rank - len(dims)
        for d in range(len(dims) - 2):
            if isinstance(sizes[d], int) and sizes[d] == 1:
                continue
            if not sizes_equal(sizes[d], shape[d + offset]):
                return None
            if out[d + offset]:
                factors.unite(out[d + offset], dims[d])
            else:
                out[d + offset] = dims[d]
            links.add(Link(slot, d, d + offset))
    return Flow(tuple(out), frozenset(links))


def embedding(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Rows of a table by index: ``(V, E)`` and ``(...)`` give ``(..., E)``."""
    weight, indices = operands
    if op.args["scale_grad_by_freq"] or op.args["sparse"]:
        return None
    last = len(indices)
    links = {Link(1, d, d) for d in range(last)} | {Link(0, 1, last)}
    return Flow((*indices, weight[1]), frozenset(links))


RULES = {
    aten.linear: linear,
    aten.matmul: matmul,
    aten.mm: matmul,
    aten.bmm: matmul,
    aten.addmm: addmm,
    aten.baddbmm: addmm,
    aten.embedding: embedding,
}
