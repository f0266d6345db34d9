"""Masks as predicates on global positions.

A mask is a sympy Boolean over ``b`` (batch), ``h`` (query head), ``q`` and ``k``
(global positions in the user's order) and *captures*: small tensors known at run time,
written as ``c0(b, k)``. Invariant: every atom is ``e >= 0``, ``e == 0`` or ``e != 0``
with an integer-valued ``e``, so that equal masks read alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import reduce

import sympy
import torch
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue
from torch import Tensor

B, H, Q, K = sympy.symbols("b h q k", integer=True, nonnegative=True)
TRUE: Boolean = sympy.true
FALSE: Boolean = sympy.false


class EmptyRow(Enum):
    """What the user's spelling gives for a query with no key.

    ``ZERO``: output 0 (a bool mask of SDPA). ``MEAN_ALL``: the mean of V over all keys
    (scores filled with ``finfo.min``). ``NAN``: NaN (scores filled with -inf).
    """

    ZERO = "zero"
    MEAN_ALL = "mean_all"
    NAN = "nan"


@dataclass(frozen=True, slots=True)
class Mask:
    """Which (query, key) pairs count.

    Attributes:
        keeps: predicate over ``b, h, q, k`` and captures; true where the pair counts.
        num_captures: how many captures ``keeps`` may name (``c0`` up to).
        empty_row: what a query with no key gives.
    """

    keeps: Boolean = TRUE
    num_captures: int = 0
    empty_row: EmptyRow = EmptyRow.ZERO

    def __and__(self, other: "Mask | Boolean") -> "Mask":
        """Both; the captures of ``other`` must already be numbered for this mask."""
        if isinstance(other, Boolean):
            return replace(self, keeps=sympy.And(self.keeps, other))
        return replace(
            self,
            keeps=sympy.And(self.keeps, other.keeps),
            num_captures=max(self.num_captures, other.num_captures),
        )

    def __str__(self) -> str:
        return format_predicate(self.keeps)


def at_least_zero(e: sympy.Expr) -> Boolean:
    """``e >= 0``, canonical."""
    return sympy.Ge(sympy.expand(e), 0)


def equals_zero(e: sympy.Expr) -> Boolean:
    """``e == 0``, canonical in sign."""
    e = sympy.expand(e)
    return sympy.Eq(-e if e.could_extract_minus_sign() else e, 0)


def negate(p: Boolean) -> Boolean:
    """Not ``p``, with the negation pushed into integer atoms."""
    if isinstance(p, (BooleanTrue, BooleanFalse)):
        return sympy.Not(p)
    if isinstance(p, sympy.Ge):
        return at_least_zero(-p.lhs - 1)
    if isinstance(p, sympy.Eq):
        return sympy.Ne(p.lhs, 0)
    if isinstance(p, sympy.Ne):
        return sympy.Eq(p.lhs, 0)
    if isinstance(p, sympy.And):
        return sympy.Or(*map(negate, p.args))
    if isinstance(p, sympy.Or):
        return sympy.And(*map(negate, p.args))
    assert isinstance(p, sympy.Not), f"not a mask predicate: {p}"
    return p.args[0]


def capture(index: int, *at: sympy.Expr) -> sympy.Expr:
    """Capture number ``index`` read at the given index expressions."""
    return sympy.Function(f"c{index}", integer=True)(*at)


def causal() -> Boolean:
    """``k <= q``."""
    return at_least_zero(Q - K)


def window(left: int = -1, right: int = -1) -> Boolean:
    """Keys at most ``left`` tokens before and ``right`` after; -1 means no limit."""
    before = TRUE if left < 0 else at_least_zero(K - Q + left)
    after = TRUE if right < 0 else at_least_zero(Q - K + right)
    return sympy.And(before, after)


def prefix(length: int) -> Boolean:
    """Keys of the first ``length`` tokens."""
    return at_least_zero(length - 1 - K)


def chunked(size: int) -> Boolean:
    """Query and key lie in the same run of ``size`` tokens."""
    return equals_zero(sympy.floor(Q / size) - sympy.floor(K / size))


def key_padding(index: int) -> Boolean:
    """Capture ``(B, S)`` is non-zero at the key."""
    return sympy.Ne(capture(index, B, K), 0)


def documents(index: int) -> Boolean:
    """Capture ``(B, S)`` of document ids agrees at query and key."""
    return equals_zero(capture(index, B, Q) - capture(index, B, K))


def conjuncts(p: Boolean) -> tuple[Boolean, ...]:
    """The predicates whose conjunction ``p`` is, in canonical order."""
    if p == TRUE:
        return ()
    return tuple(p.args) if isinstance(p, sympy.And) else (p,)


def has_captures(p: Boolean) -> bool:
    """Whether ``p`` depends on values known at run time only."""
    return bool(p.atoms(sympy.core.function.AppliedUndef))


def is_capture(e: sympy.Basic) -> bool:
    """Whether ``e`` reads a capture."""
    return isinstance(e, sympy.core.function.AppliedUndef)


def evaluate(
    p: Boolean,
    at: Sequence[Tensor],
    captures: Sequence[Tensor] = (),
) -> Tensor:
    """Evaluate a predicate on tensors of positions.

    Args:
        p: the predicate.
        at: int64 tensors ``(b, h, q, k)`` that broadcast against each other.
        captures: the capture tensors, indexed by the predicate's own expressions.

    Returns:
        bool tensor of the broadcast shape (or broadcastable to it).
    """
    values = dict(zip((B, H, Q, K), at, strict=True))
    result = _evaluate(p, values, captures)
    return result if isinstance(result, Tensor) else torch.tensor(bool(result))


_Value = Tensor | int | bool
_ATOMS: dict[type, Callable[[_Value], _Value]] = {
    sympy.Ge: lambda e: e >= 0,
    sympy.Eq: lambda e: e == 0,
    sympy.Ne: lambda e: e != 0,
}


def _evaluate(
    e: sympy.Basic, values: dict[sympy.Symbol, Tensor], captures: Sequence[Tensor]
) -> _Value:
    if isinstance(e, sympy.Symbol):
        return values[e]
    if isinstance(e, sympy.Integer):
        return int(e)
    if isinstance(e, (BooleanTrue, BooleanFalse)):
        return bool(e)
    if type(e) in _ATOMS:
        return _ATOMS[type(e)](_evaluate(e.args[0], values, captures))
    if isinstance(e, sympy.floor):
        numerator, denominator = sympy.fraction(sympy.together(e.args[0]))
        return _evaluate(numerator, values, captures) // int(denominator)
    args = [_evaluate(a, values, captures) for a in e.args]
    if is_capture(e):
        index = [_as_index(a) for a in args]
        return captures[int(e.func.__name__[1:])][tuple(index)]
    if isinstance(e, sympy.Not):
        return torch.logical_not(torch.as_tensor(args[0]))
    return reduce(_OPERATORS[e.func], args)


def _as_index(value: _Value) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


_OPERATORS: dict[type, Callable[[_Value, _Value], _Value]] = {
    sympy.Add: lambda x, y: x + y,
    sympy.Mul: lambda x, y: x * y,
    sympy.Mod: lambda x, y: x % y,
    sympy.And: lambda x, y: x & y,
    sympy.Or: lambda x, y: x | y,
}


_SIGNS = {sympy.Ge: ">=", sympy.Eq: "==", sympy.Ne: "!="}


def format_predicate(p: Boolean) -> str:
    """Write a predicate for people, e.g. ``k <= q and c0[b, k] != 0``."""
    if p == TRUE:
        return "all"
    if p == FALSE:
        return "none"
    if isinstance(p, sympy.And):
        return " and ".join(sorted(_bracket(a) for a in p.args))
    if isinstance(p, sympy.Or):
        return " or ".join(sorted(_bracket(a) for a in p.args))
    if isinstance(p, sympy.Not):
        return f"not {_bracket(p.args[0])}"
    return _format_atom(p)


def _bracket(p: Boolean) -> str:
    text = format_predicate(p)
    return f"({text})" if isinstance(p, (sympy.And, sympy.Or)) else text


def _format_atom(p: Boolean) -> str:
    """Put the negative terms on the other side: ``q - k - 3 >= 0`` is ``k + 3 <= q``."""
    terms = sympy.Add.make_args(p.args[0])
    left = [t for t in terms if not t.could_extract_minus_sign()]
    right = [-t for t in terms if t.could_extract_minus_sign()]
    lhs, rhs = _format_sum(left), _format_sum(right)
    if isinstance(p, sympy.Ge):
        return f"{rhs} <= {lhs}"
    return f"{lhs} {_SIGNS[type(p)]} {rhs}"


def _format_sum(terms: list[sympy.Expr]) -> str:
    text = str(sympy.Add(*terms))
    for e in sympy.Add(*terms).atoms(sympy.core.function.AppliedUndef):
        text = text.replace(str(e), f"{e.func.__name__}[{str(e.args)[1:-1].rstrip(',')}]")
    return text
