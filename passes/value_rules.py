"""How the values of int, bool and mask-like float tensors follow from their inputs.

``RULES`` has one rule per op: what the result holds, as a function of its own indices.
Invariant: a rule is right for every input or raises ``Unreadable``.
"""

from collections.abc import Callable

import sympy
import torch
from sympy import Expr
from torch._ops import OpOverloadPacket

from ringcompile.ir.mask import at_least_zero, conjunction
from ringcompile.passes.op import read_op
from ringcompile.passes.symbolic import (
    Content,
    Unreadable,
    Value,
    always,
    choose,
    index_symbol,
    only_expr,
    read_cases,
    read_truth,
    substitute,
)
from ringcompile.passes.value_elementwise import ELEMENTWISE
from ringcompile.passes.value_scalars import (
    WIDE_INTS,
    cast_content,
    constant_content,
    holds_tensor,
    read_scalar,
)
from ringcompile.passes.value_tests import read_test
from ringcompile.passes.value_views import VIEWS, Call, indices, read_integer
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten
Rule = Callable[[Call], Content]


# ---- views and casts -----------------------------------------------------------------


def _view(call: Call) -> Content:
    x = call.tensor("self")
    if x.dtype != call.dtype:
        raise Unreadable(f"{call.op.node.target} reads bits as another dtype")
    return x.at(VIEWS[call.op.packet](call, x))


def _cast(call: Call) -> Content:
    if call.dtype is torch.bool and (product := _read_product(call)) is not None:
        return product
    x = call.tensor("self")
    return cast_content(x.content, x.dtype, call.dtype)


def _read_product(call: Call) -> Content | None:
    """Where a product of two masks is not 0, if that is what is cast to bool."""
    op = read_op(call.op.slots[0])
    if op is None or op.packet is not aten.mul or len(op.slots) != 2:  # noqa: PLR2004
        return None
    if call.is_mutated(op.node):
        return None
    ndim = len(call.shape)
    return conjunction(*(read_truth(call.read(x).broadcast(ndim)) for x in op.slots))


def _or_test(rule: Rule) -> Rule:
    """A comparison by ``rule``; if what it compares is unknown, by the number alone."""

    def compare(call: Call) -> Content:
        try:
            return rule(call)
        except Unreadable:
            found = read_test(call)
            if found is None:
                raise
            return found

    return compare


# ---- making tensors ------------------------------------------------------------------


def _fill_with(name: str) -> Rule:
    def rule(call: Call) -> Content:
        value = call.op.args[name]
        if holds_tensor(value):
            x = call.read(value)
            return cast_content(x.broadcast(len(call.shape)), x.dtype, call.dtype)
        return constant_content(read_scalar(value), call.dtype)

    return rule


def _ones(call: Call) -> Content:
    return constant_content(sympy.S.One, call.dtype)


def _zeros(call: Call) -> Content:
    return constant_content(sympy.S.Zero, call.dtype)


def _arange(call: Call) -> Content:
    if call.dtype not in WIDE_INTS:
        raise Unreadable(f"arange of dtype {call.dtype}")
    start = read_integer(call.op.args.get("start", 0))
    step = read_integer(call.op.args.get("step", 1))
    return always(start + step * index_symbol(0))


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
    if call.dtype not in WIDE_INTS:
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
    if len(cases) != 1 or call.dtype not in WIDE_INTS:
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


def _triangle(sign: int) -> Rule:
    def rule(call: Call) -> Content:
        x = call.tensor("self")
        row, column = indices(2, start=len(x.shape) - 2)
        ahead = column - row - call.integer("diagonal")
        inside = at_least_zero(sign * ahead)
        return choose(inside, x.content, _zeros(call))

    return rule


RULES: dict[OpOverloadPacket, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    **ELEMENTWISE,
    **{op: _or_test(ELEMENTWISE[op]) for op in (aten.eq, aten.ne)},
    aten.to: _or_test(_cast),
    aten._to_copy: _or_test(_cast),  # noqa: SLF001
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
    aten.tril: _triangle(-1),
    aten.triu: _triangle(1),
    aten.index: _index,
    aten.diff: _diff,
    aten.cumsum: _cumsum,
    aten.cat: _cat,
}
