"""Where a tensor equals a small integer, though what else it holds is unknown.

``1.0 - mask.float()`` of unknown integers can't be read; that it is 0 where the mask is
1 can. Invariant: casts of integers keep which elements are ``-128 .. 128``.
"""

import torch
from sympy import Expr
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ringcompile.ir.mask import (
    FALSE,
    TRUE,
    conjunction,
    disjunction,
    equals_zero,
    negate,
)
from ringcompile.passes.op import Op, is_float, read_op
from ringcompile.passes.symbolic import (
    Content,
    Number,
    Unreadable,
    Value,
    index_symbol,
    read_cases,
    replace_terms,
)
from ringcompile.passes.value_scalars import holds_tensor
from ringcompile.passes.value_views import VIEWS, Call

aten = torch.ops.aten

_CASTS = {aten.to, aten._to_copy}  # noqa: SLF001
_LARGEST = 128


def read_test(call: Call) -> Content | None:
    """What a comparison with a number, or a cast to bool, holds; None if unreadable."""
    op = call.op
    if call.dtype is not torch.bool or len(op.slots) != 1:
        return None
    (tested,) = op.slots
    if not is_float(tested):
        return None
    try:
        if op.packet in _CASTS:
            return negate(_find_equal(call, tested, 0))
        found = _find_equal(call, tested, _small(op.args.get("other")))
    except Unreadable:
        return None
    return found if op.packet is aten.eq else negate(found)


def _small(number: object) -> int:
    """A number that every float dtype tells from its neighbours."""
    if holds_tensor(number) or not isinstance(number, int | float):
        raise Unreadable("it isn't a number")
    if number != int(number) or abs(number) > _LARGEST:
        raise Unreadable(f"{number} is no small integer")
    return int(number)


def _find_equal(call: Call, node: Node, number: int) -> Boolean:
    """Where a tensor is ``number``."""
    try:
        return _where_equal(read_cases(call.read(node).content), number)
    except Unreadable:
        op = read_op(node)
        if op is None or call.is_mutated(node):
            raise
    if op.packet in _CASTS and node.meta["val"].dtype is not torch.bool:
        return _find_equal_below_cast(call, op, number)
    if op.packet in VIEWS:
        return _find_equal_below_view(call, op, number)
    if op.packet in (aten.rsub, aten.sub) and op.args["alpha"] == 1:
        return _find_equal_below_difference(call, op, number)
    raise Unreadable(f"{node.name} isn't compared with a number")


def _where_equal(cases: tuple, number: int) -> Boolean:  # type: ignore[type-arg]
    return disjunction(
        *(conjunction(c.when, _is_number(c.number, number)) for c in cases)
    )


def _is_number(found: Number, number: int) -> Boolean:
    if isinstance(found, float):
        return TRUE if found == number else FALSE
    return equals_zero(found - number)


def _find_equal_below_cast(call: Call, op: Op, number: int) -> Boolean:
    (source,) = op.slots
    if is_float(source) and op.node.meta["val"].dtype != source.meta["val"].dtype:
        raise Unreadable(f"{op.node.name} rounds floats")  # 0.9999 may become 1
    return _find_equal(call, source, number)


def _find_equal_below_view(call: Call, op: Op, number: int) -> Boolean:
    source = op.slots[0]
    value = source.meta["val"]
    if value.dtype != op.node.meta["val"].dtype:
        raise Unreadable(f"{op.node.name} reads bits as another dtype")
    index = VIEWS[op.packet](
        Call(op, call.read), Value(tuple(value.shape), value.dtype, ())
    )
    at: dict[Expr, Expr] = {index_symbol(d): e for d, e in enumerate(index)}
    return replace_terms(_find_equal(call, source, number), at)


def _find_equal_below_difference(call: Call, op: Op, number: int) -> Boolean:
    """``x - c`` or ``c - x``, which are small integers only where x is one."""
    c = _small(op.args["other"])
    (source,) = op.slots
    wanted = c - number if op.packet is aten.rsub else c + number
    return _find_equal(call, source, _small(wanted))
