"""Ops that compute each element alone, operands broadcast against each other."""

from dataclasses import replace

import torch

from ringcompile.passes.dims import Dims, Factors
from ringcompile.passes.op import Op, shape_of
from ringcompile.passes.rules.flow import Flow, Link
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten


def broadcast(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Align operands at the last dim; a dim of size 1 is broadcast."""
    shape = shape_of(op.node)
    out: list[tuple[int, ...]] = [()] * len(shape)
    links: set[Link] = set()
    for slot, dims in enumerate(operands):
        offset = len(shape) - len(dims)
        sizes = shape_of(op.slots[slot])
        for d, dim in enumerate(dims):
            if isinstance(sizes[d], int) and sizes[d] == 1:
                continue
            if not sizes_equal(sizes[d], shape[d + offset]):
                return None
            factors.unite(out[d + offset], dim)
            if len(dim) > len(out[d + offset]):  # the finer cut shows more
                out[d + offset] = dim
            links.add(Link(slot, d, d + offset))
    return Flow(tuple(out), frozenset(links))


def dropout(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Dropout that drops nothing is the identity; any other must know its place."""
    flow = broadcast(op, factors, operands)
    drops = op.args["p"] != 0 and op.args["train"]
    return replace(flow, links=frozenset()) if drops and flow else flow


def prelu(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """The weight is one number, or runs along dim 1."""
    dims = operands[0]
    links = {Link(0, d, d) for d in range(len(dims))}
    if shape_of(op.slots[1]) != (1,):
        if len(dims) == 1:
            return None
        factors.unite(dims[1], operands[1][0])
        links.add(Link(1, 0, 1))
    return Flow(dims, frozenset(links))


# Composite ops that carry no ``pointwise`` tag but are.
# fmt: off
_UNTAGGED = (
    "to", "type_as", "_to_copy", "contiguous", "clone", "alias", "detach",
    "lift_fresh", "silu", "relu", "relu6", "selu", "celu", "mish", "hardtanh",
    "leaky_relu", "elu", "gelu", "softplus", "where", "masked_fill",
    "clamp", "clip", "square", "rsub", "true_divide", "divide", "multiply",
    "subtract", "negative", "absolute", "__and__", "__or__", "__xor__",
    "logical_and", "logical_or", "logical_not", "not_equal", "greater",
    "greater_equal", "less", "less_equal", "zeros_like", "ones_like", "full_like",
)
# fmt: on

RULES = {getattr(aten, name): broadcast for name in _UNTAGGED} | {
    aten.dropout: dropout,
    aten.feature_dropout: dropout,
    aten.alpha_dropout: dropout,
    aten.prelu: prelu,
    aten.broadcast_tensors: broadcast,
}
