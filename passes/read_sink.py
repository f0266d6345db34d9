"""Attention sinks: one more score per head, behind those of all keys, with no value."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import sympy
import torch
from sympy import Expr
from torch.fx import Node

from ringcompile.passes.coordinates import (
    COLUMN,
    HEAD,
    Grid,
    align,
    climb,
    is_view_of,
    read_index_map,
)
from ringcompile.passes.op import read_op, shape_of
from ringcompile.passes.operands import NOT_FOLLOWED
from ringcompile.passes.read_score import Score
from ringcompile.passes.symbolic import Unreadable
from ringcompile.torch_private import sizes_equal

if TYPE_CHECKING:
    from ringcompile.passes.read_spelled import Step

aten = torch.ops.aten


def add_sink(step: "Step", below: Node, score: Score) -> Score:
    """Read ``cat([scores, sinks], -1)``, whose last weight reaches no value.

    Args:
        step: the cat.
        below: the scores.
        score: the scores, as read so far.

    Raises:
        Unreadable: what stands behind the scores isn't one number per head.
    """
    op, index, grid = step.op, step.index, step.grid
    if len(op.slots) != 2 or op.slots[0] is not below:  # noqa: PLR2004 - scores and sinks
        raise Unreadable(f"{op.node.name} joins scores with others")
    sinks = op.slots[1]
    dim = op.args["dim"] % len(shape_of(op.node))
    if index[dim] != COLUMN or not sizes_equal(shape_of(sinks)[dim], 1):
        raise Unreadable(f"{op.node.name} adds more than one key")
    if step.reader.is_mutated(sinks):
        raise Unreadable(f"{sinks.name} is changed in place")
    return score.sink(_find_sinks(sinks, align(shape_of(sinks), index), grid))


def _find_sinks(node: Node, index: Sequence[Expr], grid: Grid) -> Node:
    """The nearest tensor above that has one number per head."""
    wanted = [sympy.S.Zero if sizes_equal(grid.heads, 1) else HEAD]
    while not is_view_of(node, index, (grid.heads,), wanted):
        op = read_op(node)
        if op is None or op.packet in NOT_FOLLOWED or read_index_map(op) is None:
            raise Unreadable(f"{node.name} is a sink that isn't one number per head")
        node, index = op.slots[0], climb(op, op.slots[0], index, grid)
    return node
