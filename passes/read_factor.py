"""Tensors that products of scores are multiplied with: temperatures, scales in buffers.

What no key varies is a factor of its query, so the product stays one of a Q and a K.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import sympy
from torch.fx import Node

from ringcompile.passes.coordinates import (
    BATCH,
    COLUMN,
    HEAD,
    ROW,
    Grid,
    align,
    climb,
    is_view_of,
    read_index_map,
)
from ringcompile.passes.op import is_float, read_op, shape_of
from ringcompile.passes.operands import NOT_FOLLOWED
from ringcompile.passes.read_score import FactorTerm
from ringcompile.passes.regions import FactorOperand
from ringcompile.passes.symbolic import Size, Unreadable

if TYPE_CHECKING:
    from ringcompile.passes.read_spelled import Step


def read_factor(step: "Step", node: Node, *, divides: bool) -> FactorTerm:
    """The factor that a tensor is of scores.

    Raises:
        Unreadable: it varies with the key, or what it makes has another dtype.
    """
    index = align(shape_of(node), step.index)
    while any(e.has(COLUMN) for e in index):
        op = read_op(node)
        if op is None or op.packet in NOT_FOLLOWED or read_index_map(op) is None:
            raise Unreadable(f"{node.name} multiplies scores, and varies with the key")
        node, index = op.slots[0], climb(op, op.slots[0], index, step.grid)
    if not is_float(node) or step.reader.is_mutated(node):
        raise Unreadable(
            f"{node.name} multiplies scores, and isn't float or is changed"
        )
    if step.below.meta["val"].dtype != step.dtype:
        raise Unreadable(f"{node.name} makes scores of {step.dtype}")
    return FactorTerm(node, tuple(index), divides)


def find_factor(term: FactorTerm, shape: Sequence[Size], grid: Grid) -> FactorOperand:
    """The operand that a factor is.

    Args:
        term: what scores are multiplied with.
        shape: ``(B, H, queries, keys)`` of the scores.
        grid: batch and heads.

    Raises:
        Unreadable: its dims are not batch, heads and queries in this order.
    """
    symbols = (BATCH, HEAD, ROW)
    used = [any(e.has(s) for e in term.index) for s in symbols]
    view = [size if has else 1 for size, has in zip(shape, used, strict=False)]
    wanted = [s if has else sympy.S.Zero for s, has in zip(symbols, used, strict=True)]
    index = [grid.settle(e) for e in term.index]
    if not is_view_of(term.node, index, (*view, 1), (*wanted, sympy.S.Zero)):
        raise Unreadable(
            f"{term.node.name} {list(shape_of(term.node))} multiplies scores, and its"
            " dims are not batch, heads and queries in this order"
        )
    return FactorOperand(term.node, (*view, 1), term.divides)
