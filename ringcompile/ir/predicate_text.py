"""Mask predicates written for people.

Invariant: stable ASCII; terms stand on the side where their sign is positive.
"""

from collections.abc import Sequence

import sympy
from sympy.logic.boolalg import Boolean
from sympy.printing.str import StrPrinter

from ringcompile.ir.sums import join_terms, split_floor, split_terms

_SIGNS = {sympy.Ge: ">=", sympy.Eq: "==", sympy.Ne: "!="}


def format_predicate(p: Boolean) -> str:
    """Write a predicate for people, e.g. ``k <= q and c0[b, k] != 0``."""
    if p == sympy.true:
        return "all"
    if p == sympy.false:
        return "none"
    if isinstance(p, (sympy.And, sympy.Or)):
        word = " and " if isinstance(p, sympy.And) else " or "
        return word.join(sorted(_bracket(a) for a in p.args))
    return _format_atom(p)


def _bracket(p: Boolean) -> str:
    text = format_predicate(p)
    return f"({text})" if isinstance(p, (sympy.And, sympy.Or)) else text


def _format_atom(p: Boolean) -> str:
    """Put negative terms on the other side: ``q - k - 3 >= 0`` is ``k + 3 <= q``."""
    terms, constant = split_terms(p.lhs)
    (only, *_) = terms
    if isinstance(p, (sympy.Eq, sympy.Ne)) and isinstance(only, sympy.Mod):
        return _format_remainder(p, only)
    left = [c * t for t, c in terms.items() if c > 0]
    right = [-c * t for t, c in terms.items() if c < 0]
    less = "<="
    if constant == -1 and isinstance(p, sympy.Ge) and left and right:
        constant, less = 0, "<"
    (left if constant > 0 else right).append(sympy.Integer(abs(constant)))
    lhs, rhs = _format_sum(left), _format_sum(right)
    if isinstance(p, sympy.Ge):
        return f"{rhs} {less} {lhs}"
    return f"{lhs} {_SIGNS[type(p)]} {rhs}"


def _format_remainder(p: Boolean, remainder: sympy.Expr) -> str:
    """``Mod(q + 3, 4) == 0`` is ``q % 4 == 1``."""
    if p.lhs != remainder:
        return f"{_format_sum([p.lhs])} {_SIGNS[type(p)]} 0"
    terms, constant = split_terms(remainder.args[0])
    n = int(remainder.args[1])
    x = _format_sum([join_terms(terms, 0)])
    bracketed = x if next(iter(terms)).is_Symbol and len(terms) == 1 else f"({x})"
    return f"{bracketed} % {n} {_SIGNS[type(p)]} {-constant % n}"


def _format_sum(terms: Sequence[sympy.Expr]) -> str:
    e = sympy.Add(*terms)
    text = str(_Printer().doprint(e))
    return text[1:-1] if isinstance(e, (sympy.floor, sympy.Mod)) else text


class _Printer(StrPrinter):  # type: ignore[misc] # sympy is untyped
    """Captures and tables as ``c0[b, k]``, divisions as ``(q // 4)``, ``(q % 4)``."""

    def _print_AppliedUndef(self, e: sympy.Expr) -> str:  # noqa: N802 (sympy's name)
        # Of a table the kind: its name goes on with all that makes it.
        name = e.func.__name__.partition(":")[0]
        return f"{name}[{', '.join(map(self.doprint, e.args))}]"

    def _print_floor(self, e: sympy.Expr) -> str:
        return self._print_division("//", *split_floor(e))

    def _print_Mod(self, e: sympy.Expr) -> str:  # noqa: N802 (sympy's name)
        return self._print_division("%", *e.args)

    def _print_division(self, sign: str, x: sympy.Expr, n: int) -> str:
        text = self.doprint(x)
        return f"(({text}) {sign} {n})" if x.is_Add else f"({text} {sign} {n})"
