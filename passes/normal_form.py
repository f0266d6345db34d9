"""Bring predicates to one form, so that equal masks built differently read alike.

A predicate becomes a conjunction of disjunctions of atoms, less what the ranges of its
indices decide. Invariant: the result is equal to the argument inside those ranges.
"""

from collections.abc import Mapping
from itertools import product

import sympy
from sympy import Expr
from sympy.logic.boolalg import Boolean

from ringcompile.ir.mask import FALSE, TRUE, conjunction, disjunction

MAX_CLAUSES = 64

_Clause = frozenset[Boolean]


def normalize(p: Boolean, last: Mapping[sympy.Symbol, Expr]) -> Boolean:
    """Bring ``p`` to normal form.

    Args:
        p: a predicate.
        last: the largest value of each index; all start at 0.

    Returns:
        An equal predicate; not in normal form if it has too many clauses.
    """
    decided = _decide_atoms(p, last)
    clauses = _find_clauses(decided)
    if clauses is None:
        return decided
    return conjunction(*(disjunction(*c) for c in clauses))


def _find_clauses(p: Boolean) -> set[_Clause] | None:
    """The disjunctions whose conjunction ``p`` is; None if there are too many."""
    if not isinstance(p, (sympy.And, sympy.Or)):
        return {frozenset({p})}
    parts = [_find_clauses(a) for a in p.args]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if isinstance(p, sympy.And):
        return {clause for part in known for clause in part}
    total = 1
    for part in known:
        total *= len(part)
    if total > MAX_CLAUSES:
        return None
    return {frozenset().union(*chosen) for chosen in product(*known)}


def _decide_atoms(p: Boolean, last: Mapping[sympy.Symbol, Expr]) -> Boolean:
    if isinstance(p, (sympy.And, sympy.Or)):
        join = conjunction if isinstance(p, sympy.And) else disjunction
        return join(*(_decide_atoms(a, last) for a in p.args))
    return p if p in (TRUE, FALSE) else _decide(p, last)


def _decide(atom: Boolean, last: Mapping[sympy.Symbol, Expr]) -> Boolean:
    """TRUE or FALSE where the ranges of the indices settle the atom."""
    lowest, highest = _find_range(atom.args[0], last)
    if isinstance(atom, sympy.Ge):
        if lowest is not None and lowest.is_nonnegative:
            return TRUE
        return FALSE if highest is not None and highest.is_negative else atom
    never_zero = (lowest is not None and lowest.is_positive) or (
        highest is not None and highest.is_negative
    )
    if never_zero:
        return FALSE if isinstance(atom, sympy.Eq) else TRUE
    return atom


def _find_range(
    e: Expr, last: Mapping[sympy.Symbol, Expr]
) -> tuple[Expr | None, Expr | None]:
    """Least and greatest value of an expression that is linear in the indices."""
    lowest = highest = sympy.expand(e)
    for symbol, end in last.items():
        if symbol not in e.free_symbols:
            continue
        factor = lowest.coeff(symbol)
        rest = sympy.expand(e - factor * symbol)
        if not factor.is_Integer or symbol in rest.free_symbols:
            return None, None
        at_least, at_most = (0, end) if factor > 0 else (end, 0)
        lowest = sympy.expand(lowest.subs(symbol, at_least))
        highest = sympy.expand(highest.subs(symbol, at_most))
    return lowest, highest
