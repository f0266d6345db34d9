import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import K, Q
from ringcompile.ir.sums import (
    canonical_sum,
    find_bounds,
    floor_divide,
    join_terms,
    split_extremum,
    split_terms,
)

AT = torch.arange(-12, 13)


def grow(of: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
    n = st.integers(1, 6)
    return st.one_of(
        st.builds(lambda a, b: a + b, of, of),
        st.builds(lambda a, c: c * a, of, st.integers(-6, 6)),
        st.builds(lambda a, m: sympy.floor(a / m), of, n),
        st.builds(lambda a, m: sympy.ceiling(a / m), of, n),
        st.builds(sympy.Mod, of, n),
    )


leaves = st.one_of(st.sampled_from([Q, K]), st.integers(-9, 9).map(sympy.Integer))
sums = st.recursive(leaves, grow, max_leaves=5)


def value(e: sympy.Expr, q: int, k: int) -> int:
    return int(e.subs({Q: q, K: k}))


@settings(deadline=None, max_examples=80)
@given(sums, st.integers(-15, 15), st.integers(-15, 15))
def test_a_normal_form_keeps_the_value(e: sympy.Expr, q: int, k: int) -> None:
    assert value(canonical_sum(e), q, k) == value(e, q, k)


@settings(deadline=None, max_examples=80)
@given(sums)
def test_a_normal_form_is_its_own(e: sympy.Expr) -> None:
    once = canonical_sum(e)
    assert canonical_sum(once) == once


@settings(deadline=None, max_examples=60)
@given(sums, st.integers(0, 20), st.integers(0, 20))
def test_bounds_hold_for_all_positions(e: sympy.Expr, q: int, k: int) -> None:
    low, high = find_bounds(canonical_sum(e))
    assert low is None or low <= value(e, q, k)
    assert high is None or high >= value(e, q, k)


def test_equal_sums_share_a_form() -> None:
    for a, b in [
        (sympy.Mod(K - Q, 4), 3 - sympy.Mod(Q - K + 3, 4)),
        (sympy.Mod(Q + 8, 4), sympy.Mod(Q, 4)),
        (sympy.floor((Q + 8) / 4), sympy.floor(Q / 4) + 2),
        (sympy.floor(sympy.floor(Q / 4) / 2), sympy.floor(Q / 8)),
        (sympy.floor((2 * Q + 3) / 4), sympy.floor((Q + 1) / 2)),
        (sympy.ceiling(Q / 4), sympy.floor((Q + 3) / 4)),
        (Q - 4 * sympy.floor(Q / 4), sympy.Mod(Q, 4)),
        (sympy.Mod(sympy.Mod(Q, 12), 4), sympy.Mod(Q, 4)),
    ]:
        assert canonical_sum(a) == canonical_sum(b)


def test_nested_remainders_stay_readable() -> None:
    assert str(canonical_sum(sympy.Mod(sympy.Mod(Q, 8), 3))) == "Mod(Mod(q, 8), 3)"


def test_parts_of_a_sum() -> None:
    assert split_terms(2 * Q - K + 3) == ({Q: 2, K: -1}, 3)
    assert join_terms({Q: 2, K: -1}, 3) == 2 * Q - K + 3
    assert floor_divide(4 * Q + K + 9, 4) == Q + 2 + sympy.floor((K + 1) / 4)


def test_an_extremum_is_taken_apart() -> None:
    split = split_extremum(3 - sympy.Abs(Q - K))
    assert split is not None
    assert {split.first, split.second} == {3 - (Q - K), 3 + (Q - K)}
    assert not split.is_greatest
    assert split_extremum(Q) is None


def test_evaluation_agrees_with_sympy_below_zero() -> None:
    e = sympy.floor((Q - 3) / 4) - sympy.Mod(Q - K, 5)
    zero = torch.zeros((), dtype=torch.int64)
    got = evaluate(sympy.Ge(e, 0, evaluate=False), (zero, zero, AT, AT[:, None]))
    want = [[value(e, q, k) >= 0 for q in AT.tolist()] for k in AT.tolist()]
    assert got.tolist() == want
