"""Losses of each token alone: those that are not summed are local."""

import torch

from ringcompile.passes.dims import Dims, Factors
from ringcompile.passes.op import Op, is_float, shape_of
from ringcompile.passes.rules.flow import Flow, Link
from ringcompile.passes.rules.pointwise import broadcast

aten = torch.ops.aten

NONE, MEAN, SUM = 0, 1, 2


def elementwise(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """One loss for each element."""
    return broadcast(op, factors, operands) if op.args["reduction"] == NONE else None


def classes(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """``(N, C, ...)`` scores and ``(N, ...)`` classes, or scores of each class."""
    rank = op.rank(0)
    if op.args["reduction"] != NONE or rank == 1:
        return None
    soft = is_float(op.slots[1])
    links = set()
    for d in range(rank):
        if d == 1:
            continue
        target_dim = d if soft else d - (d > 1)
        factors.unite(operands[0][d], operands[1][target_dim])
        links |= {Link(0, d, d - (d > 1)), Link(1, target_dim, d - (d > 1))}
    dims = (operands[0][0], *operands[0][2:])
    assert len(dims) == len(shape_of(op.node)), "one loss for each token"
    return Flow(dims, frozenset(links))


def cosine(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Two tensors of one shape; a dim vanishes."""
    left, right = (shape_of(node) for node in op.slots)
    if len(left) != len(right) or tuple(left) != tuple(right):
        return None
    rank = len(left)
    order = [d for d in range(rank) if d != op.args["dim"] % rank]
    for d in range(rank):
        factors.unite(operands[0][d], operands[1][d])
    links = {Link(s, d, i) for i, d in enumerate(order) for s in (0, 1)}
    return Flow(tuple(operands[0][d] for d in order), frozenset(links))


ELEMENTWISE = (
    aten.mse_loss,
    aten.l1_loss,
    aten.smooth_l1_loss,
    aten.huber_loss,
    aten.kl_div,
    aten.binary_cross_entropy,
    aten.binary_cross_entropy_with_logits,
)
BY_CLASS = (aten.cross_entropy_loss, aten.nll_loss_nd, aten.nll_loss, aten.nll_loss2d)

RULES = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(BY_CLASS, classes),
    aten.cosine_similarity: cosine,
}
