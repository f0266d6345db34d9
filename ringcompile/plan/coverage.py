"""Coverage: how much of a box of (query, key) positions a predicate keeps.

Each atom is a sum over ``q = start + stride * i`` and ``k = start + stride * j``; its
range over the box, and what residues it can take, decide it. Positions may be affine in
an unknown chunk length ``c >= 2``. Invariant: EMPTY and FULL are never wrong, whatever
the head, the batch, the captures and (where unknown) the length; PARTIAL may be.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import sympy
from sympy.logic.boolalg import Boolean

from ringcompile.errors import PlanError
from ringcompile.ir.evaluate import find_extremes
from ringcompile.ir.layout import Edge
from ringcompile.ir.mask import K, Q, conjuncts, disjunction, is_table
from ringcompile.ir.schedule import Coverage
from ringcompile.ir.sums import join_terms, split_floor, split_terms


class DependsOnLength(PlanError):  # noqa: N818 - says what to do, not what broke
    """No one plan serves every length; plan again for a given one."""

    def __init__(self, what: str) -> None:
        super().__init__(
            what,
            because="what the mask keeps there depends on the sequence length",
            instead="build the schedule for one length",
        )


@dataclass(frozen=True, slots=True)
class Span:
    """Positions ``start + stride * i`` for ``0 <= i < count``.

    Attributes:
        start: the first position, affine in the chunk length.
        stride: the distance of neighbours, at least 1.
        count: how many, affine in the chunk length; at least 1.
    """

    start: Edge
    stride: int
    count: Edge

    def part(self, first: int, count: int) -> "Span":
        """The ``count`` positions from the ``first``-th on."""
        a, b = self.start
        return Span((a, b + self.stride * first), self.stride, (0, count))


@dataclass(frozen=True, slots=True)
class Decision:
    """What a box holds of a predicate.

    Attributes:
        coverage: how much.
        undecided: the conjuncts that the box does not decide; none unless PARTIAL.
    """

    coverage: Coverage
    undecided: tuple[Boolean, ...] = ()


_LEAST_CHUNK = 2
_FULL, _EMPTY = Decision(Coverage.FULL), Decision(Coverage.EMPTY)


def find_coverage(p: Boolean, q: Span, k: Span) -> Decision:
    """How much of the box ``q x k`` the predicate keeps.

    Raises:
        DependsOnLength: it differs between chunk lengths ``c >= 2``.
    """
    decision = _decide(_compile(p), q, k)
    if decision is None:
        msg = f"mask {p} on rows {q} and keys {k}"
        raise DependsOnLength(msg)
    return decision


# Signs of edges over all c >= 2. None: it depends on c.


def is_at_least_zero(e: Edge) -> bool | None:
    """Whether ``chunks * c + rows >= 0``; None if that differs between lengths."""
    chunks, rows = e
    at_least = _LEAST_CHUNK * chunks + rows >= 0
    return at_least if not chunks or at_least == (chunks > 0) else None


def _add(x: Edge, y: Edge) -> Edge:
    return x[0] + y[0], x[1] + y[1]


def _times(n: int, x: Edge) -> Edge:
    return n * x[0], n * x[1]


# Predicates as plain data: sympy is too slow to be asked once per box.


@dataclass(frozen=True, slots=True)
class _Sum:
    """``constant + q * i + k * j + others``."""

    constant: int
    q: int
    k: int
    others: tuple[tuple[int, "_Term"], ...]


@dataclass(frozen=True, slots=True)
class _Term:
    """``floor(x / n)``, ``Mod(x, n)``, or a table at the blocks ``x`` and ``y``.

    Without ``x`` a value known at run time.
    """

    x: _Sum | None = None
    n: int = 0
    is_floor: bool = False
    is_nonnegative: bool = False
    table: str = ""
    y: _Sum | None = None


@dataclass(frozen=True, slots=True)
class _Atom:
    """``x >= 0``, ``x == 0`` or ``x != 0``."""

    p: Boolean
    x: _Sum


_Bound = tuple[_Sum, int, int]
"""``(x, low, high)`` for ``low <= x <= high``."""


@dataclass(frozen=True, slots=True)
class _All:
    """A conjunction, and the sums that it bounds on both sides."""

    args: tuple["_Node", ...]
    bounds: tuple[_Bound, ...]


@dataclass(frozen=True, slots=True)
class _Any:
    """A disjunction."""

    args: tuple["_Node", ...]


_Node = _Atom | _All | _Any


@lru_cache(maxsize=1024)
def _compile(p: Boolean) -> _Node:
    if isinstance(p, sympy.Or):
        return _Any(tuple(map(_compile, p.args)))
    if isinstance(p, (sympy.Ge, sympy.Eq, sympy.Ne)):
        return _Atom(p, _compile_sum(p.lhs))
    if p == sympy.false:
        return _Any(())
    return _All(tuple(map(_compile, conjuncts(p))), _find_bounds(p))


def _compile_sum(e: sympy.Expr) -> _Sum:
    terms, constant = split_terms(e)
    others = tuple((c, _compile_term(t)) for t, c in terms.items() if t not in {Q, K})
    return _Sum(constant, terms.get(Q, 0), terms.get(K, 0), others)


def _compile_term(t: sympy.Expr) -> _Term:
    if isinstance(t, sympy.floor):
        x, n = split_floor(t)
        return _Term(_compile_sum(x), n, is_floor=True)
    if isinstance(t, sympy.Mod):
        return _Term(_compile_sum(t.args[0]), int(t.args[1]))
    if is_table(t):
        x, y = map(_compile_sum, t.args[1:])
        return _Term(x, table=t.func.__name__, y=y)
    return _Term(is_nonnegative=bool(t.is_nonnegative))


def _find_bounds(p: Boolean) -> tuple[_Bound, ...]:
    """Each sum that ``p`` bounds on both sides."""
    least = {}
    for atom in conjuncts(p):
        if isinstance(atom, sympy.Ge):
            terms, constant = split_terms(atom.lhs)
            least[join_terms(terms, 0)] = constant
    return tuple(
        (_compile_sum(x), -low, least[-x])
        for x, low in least.items()
        if -x in least and str(x) < str(-x)
    )


# Values: base + i * q_row + j * k_row + something between low and high.


class _Value(NamedTuple):
    base: Edge
    i: int = 0
    j: int = 0
    low: Edge | None = (0, 0)
    high: Edge | None = (0, 0)

    @property
    def is_linear(self) -> bool:
        """Whether nothing is left beside the two rows."""
        return self.low == self.high == (0, 0)

    def ends(self, q: Span, k: Span) -> tuple[Edge | None, Edge | None]:
        """The least and the greatest value over the box; None for no bound."""
        (low_a, low_b), (high_a, high_b) = self.base, self.base
        for step, (a, b) in ((self.i, q.count), (self.j, k.count)):
            if step < 0:
                low_a, low_b = low_a + step * a, low_b + step * (b - 1)
            elif step > 0:
                high_a, high_b = high_a + step * a, high_b + step * (b - 1)
        low, high = self.low, self.high
        return (
            low and (low[0] + low_a, low[1] + low_b),
            high and (high[0] + high_a, high[1] + high_b),
        )


class _UnknownLengthError(Exception):
    """The value of a term is not affine in the chunk length."""


def _value(x: _Sum, q: Span, k: Span) -> _Value:
    (a, b), (c, d) = q.start, k.start
    total = _Value(
        (x.q * a + x.k * c, x.constant + x.q * b + x.k * d),
        i=0 if q.count == (0, 1) else x.q * q.stride,
        j=0 if k.count == (0, 1) else x.k * k.stride,
    )
    for factor, term in x.others:
        total = _sum(total, _scale(factor, _term_value(term, q, k)))
    return total


def _sum(x: _Value, y: _Value) -> _Value:
    return _Value(
        _add(x.base, y.base),
        x.i + y.i,
        x.j + y.j,
        None if x.low is None or y.low is None else _add(x.low, y.low),
        None if x.high is None or y.high is None else _add(x.high, y.high),
    )


def _scale(n: int, x: _Value) -> _Value:
    low, high = (x.low, x.high) if n >= 0 else (x.high, x.low)
    return _Value(
        _times(n, x.base),
        n * x.i,
        n * x.j,
        None if low is None else _times(n, low),
        None if high is None else _times(n, high),
    )


def _term_value(t: _Term, q: Span, k: Span) -> _Value:
    if t.x is None:
        return _Value((0, 0), low=(0, 0) if t.is_nonnegative else None, high=None)
    if t.y is not None:
        all_on, any_on = find_extremes(
            t.table, *(_numbers(_value(e, q, k).ends(q, k)) for e in (t.x, t.y))
        )
        return _Value((0, 0), low=(0, int(all_on)), high=(0, int(any_on)))
    x = _value(t.x, q, k)
    if x.is_linear and x.i % t.n == 0 and x.j % t.n == 0:
        # The whole box lies in one residue class.
        quotient = _floor(x.base, t.n)
        if t.is_floor:
            return _Value(quotient, x.i // t.n, x.j // t.n)
        return _Value(_add(x.base, _times(-t.n, quotient)))
    low, high = x.ends(q, k)
    if t.is_floor:
        return _Value(
            (0, 0), low=low and _floor(low, t.n), high=high and _floor(high, t.n)
        )
    return _remainder(t.n, x, low, high)


def _numbers(ends: tuple[Edge | None, Edge | None]) -> range:
    low, high = ends
    if low is None or high is None or low[0] or high[0]:
        raise _UnknownLengthError
    return range(low[1], high[1] + 1)


def _remainder(n: int, x: _Value, low: Edge | None, high: Edge | None) -> _Value:
    if low is not None and high is not None and not low[0] % n and not high[0] % n:
        quotient = _floor(low, n)
        if quotient == _floor(high, n):
            return _sum(x, _Value(_times(-n, quotient)))
    step = math.gcd(n, x.i, x.j)
    if not x.is_linear or x.base[0] % step:
        step = 1
    least = x.base[1] % step  # steps that divide n leave remainders that far apart
    return _Value((0, 0), low=(0, least), high=(0, n - step + least))


def _floor(e: Edge, n: int) -> Edge:
    if e[0] % n:
        raise _UnknownLengthError
    return e[0] // n, e[1] // n


# Decisions. None: it depends on the length.


def _decide(node: _Node, q: Span, k: Span) -> Decision | None:
    if isinstance(node, _Atom):
        coverage = _decide_atom(node, q, k)
        undecided = (node.p,) if coverage is Coverage.PARTIAL else ()
        return coverage and Decision(coverage, undecided)
    decisions = [_decide(arg, q, k) for arg in node.args]
    if isinstance(node, _Any):
        return _join_any(decisions)
    return _join_all(decisions, node.bounds, q, k)


def _join_all(
    decisions: list[Decision | None], bounds: tuple[_Bound, ...], q: Span, k: Span
) -> Decision | None:
    if any(d is not None and d.coverage is Coverage.EMPTY for d in decisions):
        return _EMPTY
    if None in decisions:
        return None
    undecided = tuple(p for d in decisions if d is not None for p in d.undecided)
    if len(undecided) > 1 and any(_is_missed(bound, q, k) for bound in bounds):
        return _EMPTY
    return Decision(Coverage.PARTIAL, undecided) if undecided else _FULL


def _join_any(decisions: list[Decision | None]) -> Decision | None:
    if any(d is not None and d.coverage is Coverage.FULL for d in decisions):
        return _FULL
    if None in decisions:
        return None
    left = [d.undecided for d in decisions if d is not None and d.undecided]
    return Decision(Coverage.PARTIAL, _any_of(tuple(left))) if left else _EMPTY


@lru_cache(maxsize=4096)
def _any_of(choices: tuple[tuple[Boolean, ...], ...]) -> tuple[Boolean, ...]:
    return conjuncts(disjunction(*(sympy.And(*choice) for choice in choices)))


def _decide_atom(atom: _Atom, q: Span, k: Span) -> Coverage | None:
    try:
        x = _value(atom.x, q, k)
    except _UnknownLengthError:
        return None
    low, high = x.ends(q, k)
    if isinstance(atom.p, sympy.Ge):
        return _decide_sign(low, high)
    coverage = _decide_zero(x, low, high)
    if isinstance(atom.p, sympy.Eq):
        return coverage
    opposite = {Coverage.FULL: Coverage.EMPTY, Coverage.EMPTY: Coverage.FULL}
    return coverage and opposite.get(coverage, coverage)


def _decide_sign(low: Edge | None, high: Edge | None) -> Coverage | None:
    all_kept = low is not None and is_at_least_zero(low)
    some_kept = high is None or is_at_least_zero(high)
    if all_kept:
        return Coverage.FULL
    if some_kept is False:
        return Coverage.EMPTY
    return Coverage.PARTIAL if all_kept is False and some_kept else None


def _decide_zero(x: _Value, low: Edge | None, high: Edge | None) -> Coverage | None:
    if low is not None and low == high:
        # chunks * c + rows: 0 always, never, or for one c >= 2.
        chunks, rows = low
        meets = chunks and rows % chunks == 0 and -rows // chunks >= _LEAST_CHUNK
        if low == (0, 0):
            return Coverage.FULL
        return None if meets else Coverage.EMPTY
    below = low is None or is_at_least_zero(_times(-1, low))
    above = high is None or is_at_least_zero(high)
    if below is False or above is False:
        return Coverage.EMPTY
    step = math.gcd(x.i, x.j) if x.is_linear else 1
    if step > 1 and x.base[0] % step == 0 and x.base[1] % step:
        return Coverage.EMPTY
    if step > 1 and x.base[0] % step:
        return None
    return Coverage.PARTIAL if below and above else None


def _is_missed(bound: _Bound, q: Span, k: Span) -> bool:
    """Whether ``low <= x <= high`` for no value that ``x`` takes with its step."""
    x, low, high = bound
    try:
        value = _value(x, q, k)
    except _UnknownLengthError:
        return False
    step = math.gcd(value.i, value.j)
    if not value.is_linear or not step or value.base[0] % step:
        return False
    return low + (value.base[1] - low) % step > high
