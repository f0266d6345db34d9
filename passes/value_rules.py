"""How the values of int, bool and mask-like float tensors follow from their inputs.

``RULES`` has one rule per op: what the result holds, as a function of its own indices.
A rule raises ``Unreadable`` for what it can't say. Ops that work element by element on
known numbers are simply run, one number at a time, so that rounding is torch's own.
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
from ringcompile.passes.symbolic import (
    Case,
    Content,
    Number,
    Unreadable,
    Value,
    always,
    choose,
    either,
    index_symbol,
    merge_cases,
    only_expr,
    read_cases,
    read_truth,
    substitute,
)
from ringcompile.passes.value_views import VIEWS, Call, indices, read_integer
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten
Rule = Callable[[Call], Content]

_WIDE = (torch.int32, torch.int64)  # overflow of narrower ones is not modelled


# ---- views and casts -----------------------------------------------------------------


def _view(call: Call) -> Content:
    x = call.tensor("self")
    if x.dtype != call.dtype:
        raise Unreadable(f"{call.op.node.target} reads bits as another dtype")
    return x.at(VIEWS[call.op.packet](call, x))


def _cast(call: Call) -> Content:
    x = call.tensor("self")
    return cast_content(x.content, x.dtype, call.dtype)


def cast_content(content: Content, old: torch.dtype, new: torch.dtype) -> Content:
    """What a tensor holds after a cast."""
    if new is torch.bool:
        return read_truth(content)
    if new == old:
        return content
    return merge_cases(
        Case(c.when, _cast_number(c.number, old, new)) for c in read_cases(content)
    )


def _cast_number(number: Number, old: torch.dtype, new: torch.dtype) -> Number:
    if is_constant(number):
        return _from_scalar(_to_scalar(number, old).to(new))
    if new in _WIDE:
        return number
    raise Unreadable(f"values that depend on positions are cast to {new}")


# ---- numbers and torch scalars -------------------------------------------------------


def is_constant(number: Number) -> bool:
    """Whether a number depends on nothing."""
    return isinstance(number, float) or bool(number.is_Integer)


def _to_scalar(number: Number, dtype: torch.dtype, ndim: int = 0) -> Tensor:
    known = number if isinstance(number, float) else int(number)
    return torch.full((1,) * ndim, known, dtype=dtype, device="cpu")


def read_constant(x: Tensor) -> Content:
    """What a tensor of one known number holds."""
    number = _from_scalar(x.detach().reshape(()))
    return _constant(number, x.dtype)


def _from_scalar(x: Tensor) -> Number:
    return float(x.item()) if x.dtype.is_floating_point else sympy.Integer(x.item())


def read_scalar(argument: Any) -> Number:  # noqa: ANN401
    """A Python or symbolic number; a symbolic float is fixed to its value, guarded."""
    value = argument.meta.get("val") if isinstance(argument, Node) else argument
    if isinstance(value, torch.SymFloat) and not value.node.has_hint():
        raise Unreadable("a number is known at run time only")
    if isinstance(value, (float, torch.SymFloat)):
        return float(value)
    return read_integer(value)


# ---- making tensors ------------------------------------------------------------------


def _fill_with(name: str) -> Rule:
    def rule(call: Call) -> Content:
        value = call.op.args[name]
        if isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor):
            x = call.read(value)
            return cast_content(x.broadcast(len(call.shape)), x.dtype, call.dtype)
        return _constant(read_scalar(value), call.dtype)

    return rule


def _constant(number: Number, dtype: torch.dtype) -> Content:
    if is_constant(number):
        number = _from_scalar(_to_scalar(number, dtype))
    elif dtype not in _WIDE:
        raise Unreadable(f"a tensor of {dtype} filled with {number}")
    return always(number) if dtype is not torch.bool else TRUE if number else FALSE


def _ones(call: Call) -> Content:
    return _constant(sympy.S.One, call.dtype)


def _zeros(call: Call) -> Content:
    return _constant(sympy.S.Zero, call.dtype)


def _arange(call: Call) -> Content:
    if call.dtype not in _WIDE:
        raise Unreadable(f"arange of dtype {call.dtype}")
    start = read_integer(call.op.args.get("start", 0))
    step = read_integer(call.op.args.get("step", 1))
    return always(start + step * index_symbol(0))


# ---- element by element --------------------------------------------------------------


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
    if fn is None or (packet in ARITHMETIC and call.dtype not in _WIDE):
        raise Unreadable(f"{call.op.node.target} of values that depend on positions")
    pending = iter(numbers)
    arguments = {
        name: next(pending) if _is_tensor(value) else _symbolic(value)
        for name, value in call.op.args.items()
    }
    keywords = {k: v for k, v in arguments.items() if k in ("alpha", "rounding_mode")}
    operands = [_integral(v) for k, v in arguments.items() if k not in keywords]
    return fn(*operands, **keywords)


def _has_symbols(call: Call) -> bool:
    return any(
        isinstance(v, torch.SymInt) or (isinstance(v, Node) and not _is_tensor(v))
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
        _to_scalar(n, x.dtype, min(len(x.shape), 1))
        for n, x in zip(numbers, tensors, strict=True)
    ]
    target = call.op.node.target
    assert isinstance(target, OpOverload), "elementwise rules are for library ops"
    values = iter(pending)
    arguments = {
        k: next(values) if _is_tensor(v) else v for k, v in call.op.args.items()
    }
    result: Tensor = target(**arguments)
    return _from_scalar(result.to(call.dtype).reshape(()))


def _is_tensor(argument: Any) -> bool:  # noqa: ANN401
    return isinstance(argument, Node) and isinstance(argument.meta.get("val"), Tensor)


# ---- logic and choice ----------------------------------------------------------------


def _logical(fn: Callable[[Boolean, Boolean], Boolean], *, bitwise: bool) -> Rule:
    def rule(call: Call) -> Content:
        if bitwise and call.dtype is not torch.bool:
            raise Unreadable(f"{call.op.node.target} on bits")
        ndim = len(call.shape)
        truths = [
            read_truth(call.read(v).broadcast(ndim))
            if _is_tensor(v)
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
    if not _is_tensor(value):
        return _constant(read_scalar(value), call.dtype)
    x = call.read(value)
    return cast_content(x.broadcast(len(call.shape)), x.dtype, call.dtype)


def _where(call: Call) -> Content:
    when = read_truth(call.tensor("condition").broadcast(len(call.shape)))
    return choose(when, _operand(call, "self"), _operand(call, "other"))


def _masked_fill(call: Call) -> Content:
    when = read_truth(call.tensor("mask").broadcast(len(call.shape)))
    return choose(when, _operand(call, "value"), _operand(call, "self"))


def _triangle(sign: int) -> Rule:
    def rule(call: Call) -> Content:
        x = call.tensor("self")
        row, column = indices(2, start=len(x.shape) - 2)
        ahead = column - row - call.integer("diagonal")
        inside = at_least_zero(sign * ahead)
        return choose(inside, x.content, _zeros(call))

    return rule


# ---- along a dim ---------------------------------------------------------------------


def _index(call: Call) -> Content:
    """Indexing by integer tensors, which broadcast against each other."""
    x = call.tensor("self")
    by_dim = dict(enumerate(call.op.args["indices"]))
    tensors = {d: call.read(n) for d, n in by_dim.items() if n is not None}
    if any(i.dtype in (torch.bool, torch.uint8) for i in tensors.values()):
        raise Unreadable("indexing by a mask")
    ndim = max(len(i.shape) for i in tensors.values())
    dims = sorted(tensors)
    together = dims == list(range(dims[0], dims[-1] + 1))
    first = dims[0] if together else 0
    outside = [d for d in range(len(x.shape)) if d not in tensors]
    index: list[Expr] = indices(len(x.shape))
    for place, dim in enumerate(outside):
        index[dim] = index_symbol(place if place < first else place + ndim)
    for dim, tensor in tensors.items():
        index[dim] = _position(tensor, first + ndim - len(tensor.shape))
    return x.at(index)


def _position(index: Value, first: int) -> Expr:
    shifted = only_expr(index.at(indices(len(index.shape), start=first)))
    if not shifted.is_nonnegative:
        raise Unreadable("an index may be negative")
    return shifted


def _diff(call: Call) -> Content:
    """``x[i] - x[i - 1]``; with a prepended element the first must fit the rest."""
    x = call.tensor("self")
    dim = call.op.args["dim"] % len(x.shape)
    if call.op.args["n"] != 1 or call.op.args["append"] is not None:
        raise Unreadable("diff with n or append")
    if call.dtype not in _WIDE:
        raise Unreadable(f"diff of dtype {call.dtype}")
    here, at = x.expr(), index_symbol(dim)
    if call.op.args["prepend"] is None:
        return always(sympy.expand(here.xreplace({at: at + 1}) - here))
    prepended = call.tensor("prepend")
    if not sizes_equal(prepended.shape[dim], 1):
        raise Unreadable("diff with several prepended elements")
    before = prepended.expr()
    rest = sympy.expand(here - here.xreplace({at: at - 1}))
    first = sympy.expand((here - before).xreplace({at: sympy.S.Zero}))
    if first != rest:
        raise Unreadable("diff whose first element stands out")
    return always(rest)


def _cumsum(call: Call) -> Content:
    x = call.tensor("self")
    at = index_symbol(call.op.args["dim"] % max(len(x.shape), 1))
    cases = read_cases(x.content)
    if len(cases) != 1 or call.dtype not in _WIDE:
        raise Unreadable("a running sum of values that vary")
    each = only_expr(cases)
    if at in each.free_symbols:
        raise Unreadable("a running sum of values that vary")
    return always(each * (at + 1))


def _cat(call: Call) -> Content:
    parts = [call.read(node) for node in call.op.slots]
    ndim = len(call.shape)
    if any(len(p.shape) != ndim for p in parts):
        raise Unreadable("cat with an empty tensor")
    at = index_symbol(call.op.args["dim"] % ndim)
    ends: list[Expr] = []
    for part in parts:
        size = read_integer(part.shape[call.op.args["dim"]])
        ends.append(size + (ends[-1] if ends else 0))
    content: Content = _shift(parts[-1], at, ends[-2] if len(ends) > 1 else 0)
    for i in reversed(range(len(parts) - 1)):
        start = ends[i - 1] if i else 0
        before_end = at_least_zero(ends[i] - 1 - at)
        content = choose(before_end, _shift(parts[i], at, start), content)
    return content


def _shift(part: Value, at: sympy.Symbol, start: Expr | int) -> Content:
    return substitute(part.content, {at: at - start})


RULES: dict[OpOverloadPacket, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys([*ARITHMETIC, *COMPARISONS], elementwise),
    aten.to: _cast,
    aten._to_copy: _cast,  # noqa: SLF001
    aten.type_as: _cast,
    aten.arange: _arange,
    aten.full: _fill_with("fill_value"),
    aten.full_like: _fill_with("fill_value"),
    aten.new_full: _fill_with("fill_value"),
    aten.fill: _fill_with("value"),
    aten.scalar_tensor: _fill_with("s"),
    aten.ones: _ones,
    aten.ones_like: _ones,
    aten.new_ones: _ones,
    aten.zeros: _zeros,
    aten.zeros_like: _zeros,
    aten.zero: _zeros,
    aten.new_zeros: _zeros,
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
    aten.tril: _triangle(-1),
    aten.triu: _triangle(1),
    aten.index: _index,
    aten.diff: _diff,
    aten.cumsum: _cumsum,
    aten.cat: _cat,
}
