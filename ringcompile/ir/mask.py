"""Masks as predicates on global positions.

A mask is a sympy Boolean over ``b`` (batch), ``h`` (query head), ``q`` and ``k``
(global positions in the user's order), *captures*, tensors known at run time and
written as ``c0(b, k)`` (``m0(b, q, x)``: its list there has ``x`` as a member), and
*tables* of blocks (``ir.tables``). Invariant: every atom
is ``e >= 0``, ``e == 0`` or ``e != 0`` with an integer-valued ``e`` in the normal form
of ``ir.sums``, and no conjunct is implied by another of the same linear form, so that
equal masks read alike.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

import sympy
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from ringcompile.ir.predicate_text import format_predicate
from ringcompile.ir.sums import (
    canonical_sum,
    clear_denominators,
    find_bounds,
    floor_divide,
    join_terms,
    split_extremum,
    split_floor,
    split_terms,
)

B, H, Q, K = sympy.symbols("b h q k", integer=True, nonnegative=True)
TRUE: Boolean = sympy.true
FALSE: Boolean = sympy.false
TABLE_MARK = ":"
"""In the name of every table, and of no capture."""


class EmptyRow(Enum):
    """What the user's spelling gives for a query with no key.

    ``ZERO``: output 0 (a bool mask of SDPA). ``NAN``: NaN (scores filled with -inf).
    ``MEAN_ALL``: the mean of V over all keys, gradients passing through the scores
    (``finfo.min`` added to them). ``MEAN_FILLED``: the same mean, the scores without a
    gradient (``finfo.min`` put in their place).
    """

    ZERO = "zero"
    MEAN_ALL = "mean_all"
    MEAN_FILLED = "mean_filled"
    NAN = "nan"


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """Blocks that each row of blocks keeps by their scores (SEMANTICS.md section 3).

    Made when the graph runs, it is the last capture of its mask: for each row of blocks
    a list of key blocks, ``(B, H, num_blocks, keep)``, -1 for none.

    Attributes:
        keep: how many blocks, the own one among them.
        block: tokens in a block.
        is_causal: whether only earlier blocks are candidates, and a query block is
            summed up by its first token.
        visible: which keys have a say, a predicate over ``b`` and ``k``.
        is_learned: whether scores ``(B, H, num_blocks, num_blocks)``, which get a
            gradient, and which blocks have a key come as captures behind the user's.
    """

    keep: int
    block: int
    is_causal: bool
    visible: Boolean
    is_learned: bool = False


@dataclass(frozen=True, slots=True)
class Mask:
    """Which (query, key) pairs count.

    Attributes:
        keeps: predicate over ``b, h, q, k`` and captures; true where the pair counts.
        num_captures: how many captures ``keeps`` may name (``c0`` up to).
        empty_row: what a query with no key gives.
        choice: how the last capture comes from Q and K; None: all are the user's.
    """

    keeps: Boolean = TRUE
    num_captures: int = 0
    empty_row: EmptyRow = EmptyRow.ZERO
    choice: BlockChoice | None = None

    def __and__(self, other: "Mask | Boolean") -> "Mask":
        """Both; the captures of ``other`` must already be numbered for this mask."""
        if isinstance(other, Boolean):
            return replace(self, keeps=conjunction(self.keeps, other))
        return replace(
            self,
            keeps=conjunction(self.keeps, other.keeps),
            num_captures=max(self.num_captures, other.num_captures),
        )

    def __str__(self) -> str:
        return format_predicate(self.keeps)


# Atoms. sympy's own evaluation is off: it would try to solve them.


def at_least_zero(e: sympy.Expr) -> Boolean:
    """``e >= 0``, canonical."""
    e = clear_denominators(sympy.sympify(e))[0]
    if split := split_extremum(e):
        join = disjunction if split.is_greatest else conjunction
        return join(at_least_zero(split.first), at_least_zero(split.second))
    return _at_least_zero(canonical_sum(e))


@lru_cache(maxsize=4096)
def _at_least_zero(e: sympy.Expr) -> Boolean:
    terms, constant = split_terms(e)
    common = math.gcd(*terms.values()) or 1
    terms = {t: c // common for t, c in terms.items()}
    constant //= common
    e = join_terms(terms, constant)
    low, high = find_bounds(e)
    if low is not None and low >= 0:
        return TRUE
    if high is not None and high < 0:
        return FALSE
    floors = [t for t in terms if isinstance(t, sympy.floor)]
    if len(terms) == len(floors) == 1:
        x, n = split_floor(floors[0])
        sign = terms[floors[0]]
        return at_least_zero(sign * x + constant * n + (n - 1 if sign < 0 else 0))
    common = math.gcd(*(terms[t] for t in floors))
    if common > 1 and not any(isinstance(t, sympy.Mod) for t in terms):
        # x + n F >= 0 iff floor(x / n) + F >= 0.
        whole = join_terms({t: terms.pop(t) // common for t in floors}, 0)
        return at_least_zero(floor_divide(join_terms(terms, constant), common) + whole)
    return sympy.GreaterThan(e, 0, evaluate=False)


def equals_zero(e: sympy.Expr) -> Boolean:
    """``e == 0``, canonical in sign."""
    e = clear_denominators(sympy.sympify(e))[0]
    if split := split_extremum(e):
        return disjunction(
            conjunction(at_least_zero(split.when), equals_zero(split.first)),
            conjunction(at_least_zero(-split.when - 1), equals_zero(split.second)),
        )
    return _equals_zero(canonical_sum(e))


@lru_cache(maxsize=4096)
def _equals_zero(e: sympy.Expr) -> Boolean:
    terms, constant = split_terms(e)
    common = math.gcd(*terms.values()) or 1
    if constant % common:
        return FALSE
    terms = {t: c // common for t, c in terms.items()}
    constant //= common
    low, high = find_bounds(join_terms(terms, constant))
    if not terms or (low is not None and low > 0) or (high is not None and high < 0):
        return TRUE if low == high == 0 else FALSE
    if all(isinstance(t, sympy.Mod) for t in terms):
        remainder = _as_one_remainder(terms, constant)
        if remainder is not None:
            return _is_multiple(*remainder)
    if len(terms) == 1 and isinstance(next(iter(terms)), sympy.floor):
        (f,) = terms
        x, n = split_floor(f)
        x += constant * terms[f] * n
        return conjunction(at_least_zero(x), at_least_zero(n - 1 - x))
    e = join_terms(terms, constant)
    return sympy.Equality(-e if e.could_extract_minus_sign() else e, 0, evaluate=False)


def _as_one_remainder(
    terms: dict[sympy.Expr, int], constant: int
) -> tuple[sympy.Expr, int] | None:
    """``(x, n)`` where the sum is 0 iff ``Mod(x, n)`` is; None if there is no such."""
    (a, *others) = terms
    n = int(a.args[1])
    if not others:
        return a.args[0] + constant * terms[a], n
    (b,) = others if len(others) == 1 else (None,)
    if b is None or constant or terms[a] != -terms[b] or b.args[1] != n:
        return None
    return a.args[0] - b.args[0], n


def _is_multiple(x: sympy.Expr, n: int) -> Boolean:
    """``n`` divides ``x``, canonical in the sign and the size of coefficients."""
    terms, constant = split_terms(canonical_sum(x))
    terms = {t: c % n for t, c in terms.items() if c % n}
    common = math.gcd(n, *terms.values())
    if constant % common:
        return FALSE
    n //= common
    if n == 1:
        return TRUE
    ways = []
    for sign in (1, -1):
        reduced = {t: _nearest(sign * c // common, n) for t, c in terms.items()}
        ways.append(join_terms(reduced, sign * constant // common % n))
    x = min(ways, key=lambda way: (way.could_extract_minus_sign(), str(way)))
    return sympy.Equality(sympy.Mod(x, n, evaluate=False), 0, evaluate=False)


def _nearest(c: int, n: int) -> int:
    """The remainder of ``c`` by ``n`` that is nearest to 0."""
    return (c + (n - 1) // 2) % n - (n - 1) // 2


def negate(p: Boolean) -> Boolean:
    """Not ``p``, with the negation pushed into integer atoms."""
    if p in {TRUE, FALSE}:
        return sympy.Not(p)
    if isinstance(p, sympy.Ge):
        return at_least_zero(-p.lhs - 1)
    if isinstance(p, sympy.Eq):
        return sympy.Unequality(p.lhs, 0, evaluate=False)
    if isinstance(p, sympy.Ne):
        return sympy.Equality(p.lhs, 0, evaluate=False)
    assert isinstance(p, (sympy.And, sympy.Or)), f"not a mask predicate: {p}"
    join = sympy.Or if isinstance(p, sympy.And) else sympy.And
    return join(*map(negate, p.args))


_RELATIONS: dict[type, Callable[[sympy.Expr], Boolean]] = {
    sympy.Ge: at_least_zero,
    sympy.Le: lambda e: at_least_zero(-e),
    sympy.Lt: lambda e: negate(at_least_zero(e)),
    sympy.Gt: lambda e: negate(at_least_zero(-e)),
    sympy.Eq: equals_zero,
    sympy.Ne: lambda e: negate(equals_zero(e)),
}


def canonicalize(p: Boolean) -> Boolean:
    """The normal form of any sympy Boolean over integer expressions."""
    if p in {TRUE, FALSE}:
        return p
    if type(p) in _RELATIONS:
        return _RELATIONS[type(p)](p.lhs - p.rhs)
    args = [canonicalize(a) for a in p.args]
    if isinstance(p, sympy.Not):
        return negate(args[0])
    if isinstance(p, (sympy.And, sympy.Or)):
        join = conjunction if isinstance(p, sympy.And) else disjunction
        return join(*args)
    assert isinstance(p, sympy.ITE), f"not a mask predicate: {p}"
    when, then, other = args
    return disjunction(conjunction(when, then), conjunction(negate(when), other))


# Joins.


def conjunction(*predicates: Boolean) -> Boolean:
    """All of them: bounds of one linear form joined, what others decide left out."""
    atoms: set[Boolean] = set()
    for p in predicates:
        atoms.update(conjuncts(p))
    bounds = _join_bounds(a for a in atoms if isinstance(a, sympy.Ge))
    if bounds is None or FALSE in atoms:
        return FALSE
    known = {a for a in atoms if isinstance(a, (sympy.Eq, sympy.Ne))} | bounds
    if any(negate(a) in known for a in known if not isinstance(a, sympy.Ge)):
        return FALSE
    open_ = {_drop_decided(a, known) for a in atoms if isinstance(a, sympy.Or)}
    if any(not isinstance(a, sympy.Or) for a in open_):
        return conjunction(*known, *open_)
    absorbed = {a for a in open_ if any(set(o.args) < set(a.args) for o in open_)}
    return sympy.And(*known, *(open_ - absorbed))


def disjunction(*predicates: Boolean) -> Boolean:
    """Any of them, in the same normal form: the negation of a conjunction."""
    return negate(conjunction(*map(negate, predicates)))


def _join_bounds(atoms: Iterable[Boolean]) -> set[Boolean] | None:
    """The tightest bounds of each linear form; None if they exclude each other."""
    least: dict[sympy.Expr, int] = {}
    for atom in atoms:
        terms, constant = split_terms(atom.lhs)
        form = join_terms(terms, 0)
        least[form] = min(constant, least.get(form, constant))
    out = set()
    for form, constant in least.items():
        slack = constant + least.get(-form, -constant + 1)
        if slack < 0:
            return None
        exact = slack == 0 and -form in least
        out.add((equals_zero if exact else at_least_zero)(form + constant))
    return out


def _drop_decided(p: Boolean, known: set[Boolean]) -> Boolean:
    """What is left of an Or where every predicate of ``known`` holds."""
    left = []
    for choice in p.args:
        rest = [a for a in conjuncts(choice) if not _implies(known, a)]
        if not rest:
            return TRUE
        if not any(_implies(known, negate(a)) for a in rest):
            left.append(sympy.And(*rest))
    return disjunction(*left) if len(left) < len(p.args) else sympy.Or(*left)


def _implies(known: set[Boolean], atom: Boolean) -> bool:
    """Whether one of ``known`` makes ``atom`` true."""
    if atom in known:
        return True
    if not isinstance(atom, sympy.Ge):
        return False
    terms, constant = split_terms(atom.lhs)
    for other in known:
        if isinstance(other, sympy.Ge):
            other_terms, other_constant = split_terms(other.lhs)
            if other_terms == terms and other_constant <= constant:
                return True
    return False


def conjuncts(p: Boolean) -> tuple[Boolean, ...]:
    """The predicates whose conjunction ``p`` is, in canonical order."""
    if p == TRUE:
        return ()
    return tuple(p.args) if isinstance(p, sympy.And) else (p,)


# The masks that models spell most.


def capture(index: int, *at: sympy.Expr) -> sympy.Expr:
    """Capture number ``index`` read at the given index expressions."""
    return sympy.Function(f"c{index}", integer=True)(*at)


def is_listed(index: int, x: sympy.Expr, *at: sympy.Expr) -> Boolean:
    """``x`` is one of the numbers that capture number ``index`` lists at ``at``."""
    return negate(equals_zero(sympy.Function(f"m{index}", integer=True)(*at, x)))


def causal() -> Boolean:
    """``k <= q``."""
    return at_least_zero(Q - K)


def later_keys(p: Boolean) -> Boolean:
    """What ``p`` keeps of keys behind their query; ``FALSE`` if nothing by its form."""
    return conjunction(p, at_least_zero(K - Q - 1))


def window(left: int = -1, right: int = -1) -> Boolean:
    """Keys at most ``left`` tokens before and ``right`` after; -1 means no limit."""
    before = TRUE if left < 0 else at_least_zero(K - Q + left)
    after = TRUE if right < 0 else at_least_zero(Q - K + right)
    return conjunction(before, after)


def prefix(length: int) -> Boolean:
    """Keys of the first ``length`` tokens."""
    return at_least_zero(length - 1 - K)


def chunked(size: int) -> Boolean:
    """Query and key lie in the same run of ``size`` tokens."""
    return equals_zero(sympy.floor(Q / size) - sympy.floor(K / size))


def key_padding(index: int) -> Boolean:
    """Capture ``(B, S)`` is non-zero at the key."""
    return negate(equals_zero(capture(index, B, K)))


def documents(index: int) -> Boolean:
    """Capture ``(B, S)`` of document ids agrees at query and key."""
    return equals_zero(capture(index, B, Q) - capture(index, B, K))


def is_capture(e: sympy.Basic) -> bool:
    """Whether ``e`` reads a capture."""
    return isinstance(e, AppliedUndef) and TABLE_MARK not in e.func.__name__


def has_captures(p: Boolean) -> bool:
    """Whether ``p`` depends on values known at run time only."""
    return any(map(is_capture, p.atoms(AppliedUndef)))


@lru_cache(maxsize=1024)
def table_function(name: str) -> Callable[..., sympy.Expr]:
    """The function of a table of ``ir.tables``: 1 where a block is on, else 0."""
    return sympy.Function(name, integer=True, nonnegative=True)  # type: ignore[no-any-return]


def is_table(e: sympy.Basic) -> bool:
    """Whether ``e`` reads a table."""
    return isinstance(e, AppliedUndef) and TABLE_MARK in e.func.__name__
