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
        return _product_with_vector(op, factors, operands)
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


def _product_with_vector(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """``(..., C) x (C,)`` and ``(C,) x (..., C, J)``."""
    left, right = operands
    if len(right) == 1:
        factors.unite(left[-1], right[0])
        links = {Link(0, d, d) for d in range(len(left) - 1)}
        return Flow(left[:-1], frozenset(links))
    factors.unite(left[0], right[-2])
    order = [d for d in range(len(right)) if d != len(right) - 2]
    links = {Link(1, d, i) for i, d in enumerate(order)}
    return Flow(tuple(right[d] for d in order), frozenset(links))


def einsum(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Each index of the result is one dim of every operand that has it."""
    terms = read_terms(op)
    if terms is None:
        return None
    *inputs, out = terms
    dims: dict[str, tuple[int, ...]] = {}
    links = set()
    for slot, term in enumerate(inputs):
        for d, index in enumerate(term):
            factors.unite(dims.setdefault(index, operands[slot][d]), operands[slot][d])
            if index in out:
                links.add(Link(slot, d, out.index(index)))
    return Flow(tuple(dims[index] for index in out), frozenset(links))


def read_terms(op: Op) -> list[str] | None:
    """Indices of each operand and of the result; None for what isn't spelled out."""
    equation = op.args["equation"].replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    terms = [*inputs.split(","), out]
    if not arrow or "." in equation or any(len(set(t)) != len(t) for t in terms):
        return None
    sizes: dict[str, object] = {}
    for term, node in zip(terms[:-1], op.slots, strict=True):
        for index, size in zip(term, shape_of(node), strict=True):
            if not sizes_equal(sizes.setdefault(index, size), size):  # type: ignore[arg-type]
                return None
    return terms


def tensordot(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """The dims that are not summed over: the left's, then the right's."""
    dims: list[tuple[int, ...]] = []
    links = set()
    for slot, name in enumerate(("dims_self", "dims_other")):
        rank = op.rank(slot)
        summed = {d % rank for d in op.args[name]}
        for d in range(rank):
            if d not in summed:
                links.add(Link(slot, d, len(dims)))
                dims.append(operands[slot][d])
    return Flow(tuple(dims), frozenset(links))


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
    aten.einsum: einsum,
    aten.tensordot: tensordot,
    aten.embedding: embedding,
}
