"""Ops on each element alone, over all choices of their operands' cases.

On known numbers the op is simply run, so that rounding is torch's own; on integers that
depend on positions it is done on expressions. Invariant: as ``value_rules``.
"""

import operator
from collections.abc import Callable
from functools import reduce
from itertools import product
from typing import Any

import sympy
import torch
from sympy import Expr
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from ringcompile.ir.mask import (
    FALSE,
    TRUE,
    at_least_zero,
    conjunction,
    disjunction,
    equals_zero,
    negate,
)
from ringcompile.ir.sums import split_terms
from ringcompile.passes.op import read_op
from ringcompile.passes.symbolic import (
    Case,
    Content,
    Number,
    Unreadable,
    Value,
    choose,
    either,
    merge_cases,
    read_cases,
    read_truth,
)
from ringcompile.passes.value_scalars import (
    WIDE_INTS,
    cast_content,
    constant_content,
    from_scalar,
    holds_tensor,
    is_constant,
    read_scalar,
    to_scalar,
)
from ringcompile.passes.value_views import Call

aten = torch.ops.aten


def _add(x: Expr, y: Expr, alpha: Expr = sympy.S.One) -> Expr:
    return x + _multiply(alpha, y)


def _subtract(x: Expr, y: Expr, alpha: Expr = sympy.S.One) -> Expr:
    return x - _multiply(alpha, y)


def _subtract_from(x: Expr, y: Expr, alpha: Expr = sympy.S.One) -> Expr:
    return y - _multiply(alpha, x)


def _multiply(x: Expr, y: Expr) -> Expr:
    if not (x.is_Integer or y.is_Integer):
        raise Unreadable("a product of two values that vary")
    return x * y


def _floor_divide(x: Expr, y: Expr) -> Expr:
    if not (y.is_Integer and y.is_positive):
        raise Unreadable(f"division by {y}")
    return sympy.floor(x / y)


def _remainder(x: Expr, y: Expr) -> Expr:
    if not (y.is_Integer and y.is_positive):
        raise Unreadable(f"a remainder by {y}")
    return sympy.Mod(x, y)


def _divide(x: Expr, y: Expr, rounding_mode: str | None = None) -> Expr:
    if rounding_mode == "floor" or (rounding_mode == "trunc" and x.is_nonnegative):
        return _floor_divide(x, y)
    raise Unreadable("division of positions into floats")


ARITHMETIC: dict[OpOverloadPacket, Callable[..., Expr]] = {
    aten.add: _add,
    aten.sub: _subtract,
    aten.rsub: _subtract_from,
    aten.mul: _multiply,
    aten.neg: operator.neg,
    aten.abs: sympy.Abs,
    aten.floor_divide: _floor_divide,
    aten.remainder: _remainder,
    aten.div: _divide,
}
COMPARISONS: dict[OpOverloadPacket, Callable[[Expr, Expr], Boolean]] = {
    aten.eq: lambda x, y: equals_zero(x - y),
    aten.ne: lambda x, y: negate(equals_zero(x - y)),
    aten.ge: lambda x, y: at_least_zero(x - y),
    aten.le: lambda x, y: at_least_zero(y - x),
    aten.gt: lambda x, y: at_least_zero(x - y - 1),
    aten.lt: lambda x, y: at_least_zero(y - x - 1),
}


def elementwise(call: Call) -> Content:
    """An op on each element alone, over all choices of its operands' cases."""
    ndim = len(call.shape)
    tensors = [call.read(node) for node in call.op.slots]
    choices = [read_cases(x.broadcast(ndim)) for x in tensors]
    results = []
    for chosen in product(*choices):
        when = conjunction(*(c.when for c in chosen))
        if when != FALSE:
            numbers = [c.number for c in chosen]
            results.append(Case(when, _apply(call, tensors, numbers)))
    if call.dtype is not torch.bool:
        return merge_cases(results)
    return disjunction(*(conjunction(c.when, _as_predicate(c.number)) for c in results))


def _as_predicate(truth: Number | Boolean) -> Boolean:
    return truth if isinstance(truth, Boolean) else TRUE if truth else FALSE


def _apply(call: Call, tensors: list[Value], numbers: list[Number]) -> Number | Any:  # noqa: ANN401
    """The result for one number per tensor operand."""
    if all(is_constant(n) for n in numbers) and not _has_symbols(call):
        return _run(call, tensors, numbers)
    packet = call.op.packet
    fn = ARITHMETIC.get(packet) or COMPARISONS.get(packet)
    if fn is None or (packet in ARITHMETIC and call.dtype not in WIDE_INTS):
        raise Unreadable(f"{call.op.node.target} of values that depend on positions")
    pending = iter(numbers)
    arguments = {
        name: next(pending) if holds_tensor(value) else _symbolic(value)
        for name, value in call.op.args.items()
    }
    keywords = {k: v for k, v in arguments.items() if k in ("alpha", "rounding_mode")}
    operands = [_integral(v) for k, v in arguments.items() if k not in keywords]
    result = fn(*operands, **keywords)
    if packet in ARITHMETIC:
        _check_fits(result, call.dtype)
    return result


# Positions are taken to be below 2^23.
_LARGEST_FACTOR = {torch.int32: 1 << 7, torch.int64: 1 << 39}


def _check_fits(e: Expr, dtype: torch.dtype) -> None:
    """Integers that wrap around are no longer what their expression says."""
    terms, constant = split_terms(sympy.expand(e))
    limit = _LARGEST_FACTOR[dtype]
    if any(abs(c) > limit for c in terms.values()) or abs(constant) > limit << 23:
        raise Unreadable(f"{e} may be too large for {dtype}")


def _has_symbols(call: Call) -> bool:
    return any(
        isinstance(v, torch.SymInt) or (isinstance(v, Node) and not holds_tensor(v))
        for v in call.op.args.values()
    )


def _symbolic(argument: Any) -> Any:  # noqa: ANN401
    return argument if isinstance(argument, str | None) else read_scalar(argument)


def _integral(number: Number) -> Expr:
    if not isinstance(number, float):
        return number
    if not number.is_integer():
        raise Unreadable(f"positions meet the number {number}")
    return sympy.Integer(int(number))


def _run(call: Call, tensors: list[Value], numbers: list[Number]) -> Number:
    """Run the op on one number per operand, each of its tensor's dtype."""
    pending = [
        to_scalar(n, x.dtype, min(len(x.shape), 1))
        for n, x in zip(numbers, tensors, strict=True)
    ]
    target = call.op.node.target
    assert isinstance(target, OpOverload), "elementwise rules are for library ops"
    values = iter(pending)
    arguments = {
        k: next(values) if holds_tensor(v) else v for k, v in call.op.args.items()
    }
    result: Tensor = target(**arguments)
    return from_scalar(result.to(call.dtype).reshape(()))


# ---- logic and choice ----------------------------------------------------------------


def _logical(
    fn: Callable[[Boolean, Boolean], Boolean], *, bitwise: bool
) -> Callable[[Call], Content]:
    def rule(call: Call) -> Content:
        if bitwise and call.dtype is not torch.bool:
            raise Unreadable(f"{call.op.node.target} on bits")
        ndim = len(call.shape)
        truths = [
            read_truth(call.read(v).broadcast(ndim))
            if holds_tensor(v)
            else _as_predicate(read_scalar(v))
            for v in call.op.args.values()
        ]
        return reduce(fn, truths)

    return rule


def _not(call: Call) -> Content:
    x = call.tensor("self")
    if call.op.packet is aten.bitwise_not and x.dtype is not torch.bool:
        raise Unreadable("bitwise_not on bits")
    return negate(read_truth(x.content))


def _differ(x: Boolean, y: Boolean) -> Boolean:
    return either(x, negate(y), y)


def _operand(call: Call, name: str) -> Content:
    """A tensor or number argument, cast and broadcast to the result."""
    value = call.op.args[name]
    if not holds_tensor(value):
        return constant_content(read_scalar(value), call.dtype)
    x = call.read(value)
    return cast_content(x.broadcast(len(call.shape)), x.dtype, call.dtype)


def _where(call: Call) -> Content:
    when = read_truth(call.tensor("condition").broadcast(len(call.shape)))
    return choose(when, _operand(call, "self"), _operand(call, "other"))


def _masked_fill(call: Call) -> Content:
    when = read_truth(call.tensor("mask").broadcast(len(call.shape)))
    if _fills_all_but_zeros(call):
        return choose(when, _operand(call, "value"), constant_content(0.0, call.dtype))
    return choose(when, _operand(call, "value"), _operand(call, "self"))


def _fills_all_but_zeros(call: Call) -> bool:
    """Whether the mask is where the tensor itself is not 0."""
    x = call.op.args["self"]
    mask = read_op(call.op.args["mask"])
    if mask is None or mask.slots != (x,) or call.is_mutated(x):
        return False
    if mask.packet is aten.ne:
        return bool(mask.args["other"] == 0)
    return mask.packet in (aten.to, aten._to_copy)  # noqa: SLF001


ELEMENTWISE: dict[OpOverloadPacket, Callable[[Call], Content]] = {
    **dict.fromkeys([*ARITHMETIC, *COMPARISONS], elementwise),
    aten.__and__: _logical(conjunction, bitwise=True),
    aten.bitwise_and: _logical(conjunction, bitwise=True),
    aten.logical_and: _logical(conjunction, bitwise=False),
    aten.__or__: _logical(disjunction, bitwise=True),
    aten.bitwise_or: _logical(disjunction, bitwise=True),
    aten.logical_or: _logical(disjunction, bitwise=False),
    aten.__xor__: _logical(_differ, bitwise=True),
    aten.bitwise_xor: _logical(_differ, bitwise=True),
    aten.logical_xor: _logical(_differ, bitwise=False),
    aten.logical_not: _not,
    aten.bitwise_not: _not,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
}
