"""Zeros that are put beside weights: before they are summed up, or afterwards.

Before, that drops keys. Afterwards it changes nothing if those keys were dropped
already, except that a query without any key gives zero.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from sympy import Expr
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ringcompile.ir.mask import EmptyRow, conjuncts, disjunction, negate
from ringcompile.passes.coordinates import align
from ringcompile.passes.op import Op, shape_of
from ringcompile.passes.parts import Parts, Refused
from ringcompile.passes.read_added import read_condition
from ringcompile.passes.read_score import Score
from ringcompile.passes.read_values import Reader
from ringcompile.passes.symbolic import Unreadable, read_cases
from ringcompile.passes.value_scalars import holds_tensor, read_scalar

aten = torch.ops.aten


def drop_zeros(
    reader: Reader, masked: tuple[Op, Node], index: Sequence[Expr], score: Score
) -> Score:
    """Scores whose exps an op puts zeros beside: there they are -inf.

    Args:
        reader: reads the graph.
        masked: the op, and which of its operands the exps are.
        index: of its result.
        score: what the exps were taken of.
    """
    dropped = _read_zeros(reader, *masked, index)
    return score.fill(dropped, -math.inf, score.dtype)


def settle_refilled(
    parts: Parts, filled: Sequence[tuple[Op, Node, Sequence[Expr]]], reader: Reader
) -> Parts:
    """Weights in which zeros were put once they were summed up.

    Args:
        parts: the attention without that.
        filled: each op that did so, the operand that holds weights, and its index.
        reader: reads the graph.

    Raises:
        Refused: a weight was not zero before.
    """
    if not filled:
        return parts
    places = disjunction(*(_read_zeros(reader, *each) for each in filled))
    kept, rest = set(conjuncts(parts.score.keeps)), set(conjuncts(negate(places)))
    if not rest <= kept:
        raise Refused(
            f"attention whose weights {filled[0][0].node.name} sets to zero",
            because="what is left then does not sum to 1",
            instead="mask scores by -inf before the softmax",
        )
    is_whole = rest == kept and not parts.score.biases and parts.score.sinks is None
    finite = all(math.isfinite(drop.number) for drop in parts.score.drops)
    if is_whole and finite:
        return replace(parts, infinite=None, empty_row=EmptyRow.ZERO)
    return replace(parts, infinite=None)  # NaN of an empty row stays in gradients


def _read_zeros(reader: Reader, op: Op, below: Node, index: Sequence[Expr]) -> Boolean:
    """Where the op puts zeros, elsewhere what ``below`` holds, over ``i0 .. i3``."""
    if op.packet is aten.mul:
        return _read_factor(reader, op, below, index)
    if op.packet is aten.masked_fill:
        _check_zero(op, op.args["value"], is_self=op.args["self"] is below)
        return read_condition(reader, op.args["mask"], index)
    kept = read_condition(reader, op.args["condition"], index)
    is_self = op.args["self"] is below
    _check_zero(op, op.args["other" if is_self else "self"], is_self=True)
    return negate(kept) if is_self else kept


def _read_factor(reader: Reader, op: Op, below: Node, index: Sequence[Expr]) -> Boolean:
    others = [n for n in op.slots if n is not below]
    if len(others) != 1:
        raise Unreadable(f"{op.node.name} multiplies exps by one number")
    (factor,) = others
    if reader.is_mutated(factor):
        raise Unreadable(f"{factor.name} is changed in place")
    cases = read_cases(reader.read(factor).at(align(shape_of(factor), index)))
    numbers = [_only_number(case.number) for case in cases]
    if not set(numbers) <= {0.0, 1.0}:
        raise Unreadable(f"{factor.name} holds other numbers than 0 and 1")
    ones = [c.when for c, number in zip(cases, numbers, strict=True) if number == 1.0]
    return negate(disjunction(*ones))


def _only_number(number: object) -> float:
    if isinstance(number, float) or getattr(number, "is_Integer", False):
        return float(number)  # type: ignore[arg-type]
    raise Unreadable("exps are multiplied by a number that depends on positions")


def _check_zero(op: Op, value: object, *, is_self: bool) -> None:
    if not is_self or holds_tensor(value) or read_scalar(value) != 0:
        raise Unreadable(f"{op.node.name} puts other numbers than 0 beside weights")
