"""Bring predicates to one form, so that equal masks built differently read alike.

A predicate becomes a conjunction of clauses, each a disjunction of atoms; what another
atom or clause already says is dropped. Invariant: the result is equal to the argument
at every position inside the ranges.
"""

from collections.abc import Iterable, Mapping
from itertools import product

import sympy
from sympy import Expr
from sympy.logic.boolalg import Boolean

from ringcompile.ir.mask import FALSE, TRUE, at_least_zero, negate

MAX_CLAUSES = 64

Clause = frozenset[Boolean]


def normalize(p: Boolean, last: Mapping[sympy.Symbol, Expr]) -> Boolean:
    """Bring ``p`` to normal form.

    Args:
        p: a predicate.
        last: the largest value of each index; all start at 0.

    Returns:
        An equal predicate; ``p`` itself if it has too many clauses to look at.
    """
    clauses = _find_clauses(p)
    if clauses is None:
        return p
    simple = {_simplify_clause(c, last) for c in clauses}
    kept = {c for c in simple if TRUE not in c}
    while (tighter := _tighten(kept)) != kept:
        kept = tighter
    if frozenset() in kept:
        return FALSE
    minimal = [c for c in kept if not any(other < c for other in kept)]
    return sympy.And(*(sympy.Or(*c) for c in minimal))


def _find_clauses(p: Boolean) -> set[Clause] | None:
    if p in (TRUE, FALSE):
        return set() if p == TRUE else {frozenset()}
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


def _simplify_clause(clause: Clause, last: Mapping[sympy.Symbol, Expr]) -> Clause:
    """Decide atoms by their range; the clause is ``{TRUE}`` if it always holds."""
    atoms = {_decide(a, last) for a in clause} - {FALSE}
    if TRUE in atoms or any(negate(a) in atoms for a in atoms):
        return frozenset({TRUE})
    bounds, rest = _split_bounds(atoms)
    if any(-e in bounds and bounds[e] + bounds[-e] >= -1 for e in bounds):
        return frozenset({TRUE})
    return frozenset(rest | {at_least_zero(e + n) for e, n in bounds.items()})


def _split_bounds(atoms: Iterable[Boolean]) -> tuple[dict[Expr, int], set[Boolean]]:
    """Atoms ``e + n >= 0``, of each ``e`` the weakest, and all other atoms."""
    bounds: dict[Expr, int] = {}
    rest = set()
    for atom in atoms:
        constant, e = _split_constant(atom)
        if e is None:
            rest.add(atom)
        else:
            bounds[e] = max(bounds.get(e, constant), constant)
    return bounds, rest


def _split_constant(atom: Boolean) -> tuple[int, Expr | None]:
    if not isinstance(atom, sympy.Ge):
        return 0, None
    constant, e = atom.lhs.as_coeff_Add()
    if not constant.is_Integer:
        return 0, None
    return int(constant), e


def _tighten(clauses: set[Clause]) -> set[Clause]:
    """Keep the tightest of bounds on one expression; settle other clauses by them."""
    units = {atom for clause in clauses if len(clause) == 1 for atom in clause}
    tightest: dict[Expr, int] = {}
    facts = set()
    for atom in units:
        constant, e = _split_constant(atom)
        if e is None:
            facts.add(atom)
        else:
            tightest[e] = min(tightest.get(e, constant), constant)
    facts |= {at_least_zero(e + n) for e, n in tightest.items()}
    settled = {_settle(c, facts, tightest) for c in clauses if len(c) > 1}
    return {c for c in settled if TRUE not in c} | {frozenset({f}) for f in facts}


def _settle(clause: Clause, facts: set[Boolean], bounds: Mapping[Expr, int]) -> Clause:
    """What is left to say of a clause; ``{TRUE}`` if nothing."""
    kept = set()
    for atom in clause:
        constant, e = _split_constant(atom)
        implied = e is not None and e in bounds and bounds[e] <= constant
        if implied or atom in facts:
            return frozenset({TRUE})
        refuted = e is not None and -e in bounds and bounds[-e] + constant < 0
        if not refuted and negate(atom) not in facts:
            kept.add(atom)
    return frozenset(kept)


def _decide(atom: Boolean, last: Mapping[sympy.Symbol, Expr]) -> Boolean:
    """TRUE or FALSE where the ranges of the indices settle the atom."""
    if atom in (TRUE, FALSE):
        return atom
    lowest, highest = _find_range(atom.args[0], last)
    if isinstance(atom, sympy.Ge):
        if lowest is not None and lowest.is_nonnegative:
            return TRUE
        if highest is not None and highest.is_negative:
            return FALSE
        return atom
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
