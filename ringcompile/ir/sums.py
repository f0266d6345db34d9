"""Integer expressions over positions, in one normal form.

Turns any sum of symbols, captures, floors and remainders into one that equal spellings
share: floors hold reduced arguments, and what is a remainder is written as one.
Invariant: a normal form has the value of what it came from, for all integers.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import sympy

_ONE = sympy.Integer(1)
Terms = dict[sympy.Expr, int]


def split_terms(e: sympy.Expr) -> tuple[Terms, int]:
    """The integer coefficient of each term of a sum, and its constant."""
    coefficients = {t: int(c) for t, c in e.as_coefficients_dict().items()}
    constant = coefficients.pop(_ONE, 0)
    return {t: c for t, c in coefficients.items() if c}, constant


def join_terms(terms: Terms, constant: int) -> sympy.Expr:
    """The sum of ``split_terms``."""
    return sympy.Add(*(c * t for t, c in terms.items()), constant)


def clear_denominators(e: sympy.Expr) -> tuple[sympy.Expr, int]:
    """``(n * e, n)`` with the least positive ``n`` that leaves integer coefficients."""
    e = sympy.expand(e)
    n = math.lcm(*(int(c.q) for c in e.as_coefficients_dict().values()))
    return sympy.expand(n * e), n


def split_floor(e: sympy.floor) -> tuple[sympy.Expr, int]:
    """``(x, n)`` where ``e`` is ``floor(x / n)``."""
    return clear_denominators(e.args[0])


@lru_cache(maxsize=4096)
def canonical_sum(e: sympy.Expr) -> sympy.Expr:
    """The normal form of an integer-valued expression."""
    return _with_remainders(sympy.expand(_with_floors(sympy.expand(e))))


def _with_floors(e: sympy.Expr) -> sympy.Expr:
    """Every remainder and ceiling as a floor, every floor reduced."""
    if isinstance(e, (sympy.floor, sympy.ceiling)):
        sign = 1 if isinstance(e, sympy.floor) else -1
        x, n = clear_denominators(sign * e.args[0])
        return sign * floor_divide(canonical_sum(x), n)
    if isinstance(e, sympy.Mod):
        x, n = canonical_sum(e.args[0]), int(e.args[1])
        assert n >= 1, f"a remainder by {n}"
        return _with_floors(x) - n * floor_divide(x, n)
    if not e.args:
        return e
    # `rebuild` keeps captures and nonlinear functions, with normal arguments.
    rebuild = _with_floors if isinstance(e, (sympy.Add, sympy.Mul)) else canonical_sum
    return e.func(*map(rebuild, e.args))


def floor_divide(x: sympy.Expr, n: int) -> sympy.Expr:
    """``floor(x / n)`` for integer-valued ``x``, with whole parts taken out."""
    terms, constant = split_terms(sympy.expand(x))
    for t, c in terms.items():
        if isinstance(t, sympy.Mod) and c * int(t.args[1]) % n == 0:
            return floor_divide(x - c * t + c * _with_floors(t), n)
    # Symmetric remainders: 3q over 4 is q + (-q over 4).
    rest = {t: (c + (n - 1) // 2) % n - (n - 1) // 2 for t, c in terms.items()}
    whole = {t: (c - rest[t]) // n for t, c in terms.items()}
    out = join_terms(whole, constant // n)
    return out + _floor({t: c for t, c in rest.items() if c}, constant % n, n)


def _floor(terms: Terms, constant: int, n: int) -> sympy.Expr:
    """``floor((terms + constant) / n)``, its terms already less than ``n``."""
    if not terms:
        return sympy.Integer(constant // n)
    common = math.gcd(n, *terms.values())
    if common > 1:
        terms = {t: c // common for t, c in terms.items()}
        return floor_divide(join_terms(terms, constant // common), n // common)
    if min(terms, key=str) in {t for t, c in terms.items() if c < 0}:
        terms = {t: -c for t, c in terms.items()}
        return -floor_divide(join_terms(terms, n - 1 - constant), n)
    if len(terms) == 1 and isinstance(inner := next(iter(terms)), sympy.floor):
        x, m = split_floor(inner)
        if terms[inner] == 1:
            return floor_divide(x + constant * m, m * n)
    return sympy.floor(join_terms(terms, constant) / n)


def _with_remainders(e: sympy.Expr) -> sympy.Expr:
    """Write ``m * (x - n * floor(x / n))`` as ``m * Mod(x, n)``."""
    terms, constant = split_terms(e)
    floors = [t for t in terms if isinstance(t, sympy.floor)]
    # Shorter first: a remainder may lie in the next floor.
    for f in sorted(floors, key=lambda t: (len(str(t)), str(t))):
        x, n = split_floor(f)
        part, shift = split_terms(x)
        m, rest = divmod(-terms[f], n)
        if rest or any(terms.get(t, 0) != m * c for t, c in part.items()):
            continue
        for t in (f, *part):
            del terms[t]
        constant -= m * shift
        remainder = sympy.Mod(x, n)
        terms[remainder] = terms.get(remainder, 0) + m
    return join_terms(terms, constant)


Bounds = tuple[int | None, int | None]


def find_bounds(e: sympy.Expr) -> Bounds:
    """The least and greatest value ``e`` can have; None where there is none."""
    terms, constant = split_terms(e)
    low: int | None = constant
    high: int | None = constant
    for t, c in terms.items():
        ends = [None if b is None else c * b for b in _term_bounds(t)]
        first, last = ends if c > 0 else ends[::-1]
        low = None if low is None or first is None else low + first
        high = None if high is None or last is None else high + last
    return low, high


def _term_bounds(t: sympy.Expr) -> Bounds:
    if isinstance(t, sympy.Mod):
        return 0, int(t.args[1]) - 1
    if isinstance(t, sympy.floor):
        x, n = split_floor(t)
        low, high = find_bounds(x)
        return (
            None if low is None else low // n,
            None if high is None else high // n,
        )
    return (0 if t.is_nonnegative else None), None


@dataclass(frozen=True, slots=True)
class Split:
    """A sum that holds a greatest or least of two, taken apart.

    Attributes:
        first: the sum where ``when >= 0``.
        second: the sum elsewhere.
        when: which of the two holds.
        is_greatest: whether the sum is the greater of the two, or the lesser.
    """

    first: sympy.Expr
    second: sympy.Expr
    when: sympy.Expr
    is_greatest: bool


def split_extremum(e: sympy.Expr) -> Split | None:
    """Take the first term ``Abs``, ``Max`` or ``Min`` out of a sum; None if none is."""
    found = sorted((t for t in split_terms(e)[0] if isinstance(t, _EXTREMA)), key=str)
    if not found:
        return None
    extremum = found[0]
    a, *others = extremum.args
    is_max = not isinstance(extremum, sympy.Min)
    b = extremum.func(*others) if others else -a
    return Split(
        first=e.xreplace({extremum: a}),
        second=e.xreplace({extremum: b}),
        when=a - b if is_max else b - a,
        is_greatest=is_max == (split_terms(e)[0][extremum] > 0),
    )


_EXTREMA = (sympy.Abs, sympy.Max, sympy.Min)
