"""Tensors whose elements are known as functions of their own indices.

``arange(S)[None] <= arange(S)[:, None]`` is ``i1 <= i0``. A value is either a predicate
(bool) or a choice among numbers by predicates that are disjoint and cover everything;
a number is an integer expression, or a Python float where the dtype is floating.
Invariants: a dim of size 1 is never indexed; atoms are those of ``ir.mask``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from ringcompile.ir.mask import (
    FALSE,
    TRUE,
    at_least_zero,
    conjunction,
    disjunction,
    equals_zero,
    negate,
)
from ringcompile.torch_private import sizes_equal

Size: TypeAlias = int | torch.SymInt
Number: TypeAlias = sympy.Expr | float
MAX_CASES = 16


class Unreadable(Exception):  # noqa: N818
    """What a tensor holds can't be told from its indices.

    Attributes:
        because: why.
    """

    def __init__(self, because: str) -> None:
        super().__init__(because)
        self.because = because


@dataclass(frozen=True, slots=True)
class Case:
    """``number`` wherever ``when`` holds."""

    when: Boolean
    number: Number


Content: TypeAlias = Boolean | tuple[Case, ...]


@cache
def index_symbol(dim: int) -> sympy.Symbol:
    """The index into dim ``dim`` of the tensor at hand."""
    return sympy.Symbol(f"i{dim}", integer=True, nonnegative=True)


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor known as a function of its indices ``i0, i1, ...``.

    Attributes:
        shape: its sizes.
        dtype: its dtype.
        content: a predicate for bool, otherwise cases of numbers.
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype
    content: Content

    def at(self, index: Sequence[sympy.Expr]) -> Content:
        """What it holds at index expressions, one per dim."""
        assert len(index) == len(self.shape), "one index per dim"
        return substitute(
            self.content, {index_symbol(d): e for d, e in enumerate(index)}
        )

    def broadcast(self, ndim: int) -> Content:
        """What it holds as a function of the indices of a shape of ``ndim`` dims."""
        first = ndim - len(self.shape)
        return self.at([index_symbol(first + d) for d in range(len(self.shape))])

    def expr(self) -> sympy.Expr:
        """The one integer expression that it is."""
        return only_expr(self.content)


def make_value(shape: Iterable[Size], dtype: torch.dtype, content: Content) -> Value:
    """Build a value, dims of size 1 read at index 0."""
    shape = tuple(shape)
    ones = {
        index_symbol(d): sympy.S.Zero
        for d, size in enumerate(shape)
        if sizes_equal(size, 1)
    }
    return Value(shape, dtype, substitute(content, ones) if ones else content)


def only_expr(content: Content) -> sympy.Expr:
    """The one integer expression that a content consists of."""
    if isinstance(content, tuple) and len(content) == 1:
        number = content[0].number
        if isinstance(number, sympy.Expr):
            return number
    raise Unreadable("it isn't one integer expression of its indices")


def always(number: Number) -> tuple[Case, ...]:
    """The same number everywhere."""
    return (Case(TRUE, number),)


def read_cases(content: Content) -> tuple[Case, ...]:
    """A predicate as the numbers 1 and 0; cases as they are."""
    if isinstance(content, tuple):
        return content
    return merge_cases(
        [Case(content, sympy.S.One), Case(negate(content), sympy.S.Zero)]
    )


def read_truth(content: Content) -> Boolean:
    """Where a content is not zero."""
    if not isinstance(content, tuple):
        return content
    return disjunction(*(conjunction(c.when, _is_nonzero(c.number)) for c in content))


def _is_nonzero(number: Number) -> Boolean:
    if isinstance(number, float):
        return TRUE if number != 0 else FALSE
    return negate(equals_zero(number))


def choose(when: Boolean, then: Content, otherwise: Content) -> Content:
    """``then`` where ``when`` holds, else ``otherwise``."""
    if not isinstance(then, tuple) and not isinstance(otherwise, tuple):
        return either(when, then, otherwise)
    cases = [Case(conjunction(when, c.when), c.number) for c in read_cases(then)]
    rest = negate(when)
    cases += [Case(conjunction(rest, c.when), c.number) for c in read_cases(otherwise)]
    return merge_cases(cases)


def either(when: Boolean, then: Boolean, otherwise: Boolean) -> Boolean:
    """``then`` where ``when`` holds, else ``otherwise``, of predicates."""
    return disjunction(conjunction(when, then), conjunction(negate(when), otherwise))


def merge_cases(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Drop impossible cases and join those of the same number."""
    merged: dict[Number, Boolean] = {}
    for case in cases:
        if case.when == FALSE:
            continue
        key = math.nan if _is_nan(case.number) else case.number
        merged[key] = disjunction(merged.get(key, FALSE), case.when)
    if len(merged) > MAX_CASES:
        raise Unreadable(f"it takes more than {MAX_CASES} different values")
    return tuple(Case(when, number) for number, when in merged.items())


def _is_nan(number: Number) -> bool:
    return isinstance(number, float) and math.isnan(number)


# ---- substitution --------------------------------------------------------------------


def substitute(content: Content, mapping: dict[sympy.Expr, sympy.Expr]) -> Content:
    """Replace symbols, all at once, and make the atoms canonical again."""
    used = _symbols_in(content)
    if all(s not in used or s == e for s, e in mapping.items()):
        return content
    if isinstance(content, tuple):
        return merge_cases(
            Case(replace_terms(c.when, mapping), _replace_number(c.number, mapping))
            for c in content
        )
    return replace_terms(content, mapping)


def _symbols_in(content: Content) -> set[sympy.Symbol]:
    if not isinstance(content, tuple):
        return set(content.free_symbols)
    parts = [c.when for c in content]
    parts += [c.number for c in content if not isinstance(c.number, float)]
    return {symbol for part in parts for symbol in part.free_symbols}


def _replace_number(number: Number, mapping: dict[sympy.Expr, sympy.Expr]) -> Number:
    return number if isinstance(number, float) else number.xreplace(mapping)


def replace_terms(p: Boolean, mapping: dict[sympy.Expr, sympy.Expr]) -> Boolean:
    """Replace terms inside a predicate's atoms, all at once."""
    return map_atoms(p, lambda e: e.xreplace(mapping))


def map_atoms(p: Boolean, change: Callable[[sympy.Expr], sympy.Expr]) -> Boolean:
    """Change the integer of every atom of a predicate."""
    if p in (TRUE, FALSE):
        return p
    if isinstance(p, (sympy.And, sympy.Or)):
        join = conjunction if isinstance(p, sympy.And) else disjunction
        return join(*(map_atoms(a, change) for a in p.args))
    if isinstance(p, sympy.Ge):
        return at_least_zero(change(p.lhs))
    same = equals_zero(change(p.lhs))
    assert isinstance(p, (sympy.Eq, sympy.Ne)), f"not an atom of a mask: {p}"
    return same if isinstance(p, sympy.Eq) else negate(same)


def captures_in(e: sympy.Basic) -> set[AppliedUndef]:
    """The reads of run-time tensors inside an expression or predicate."""
    return set(e.atoms(AppliedUndef))
