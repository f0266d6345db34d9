import operator

import pytest
import sympy
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import captures, positions, predicates
from sympy import floor

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import (
    FALSE,
    TRUE,
    B,
    EmptyRow,
    H,
    K,
    Mask,
    Q,
    at_least_zero,
    canonicalize,
    capture,
    causal,
    chunked,
    conjunction,
    conjuncts,
    disjunction,
    documents,
    equals_zero,
    has_captures,
    key_padding,
    negate,
    prefix,
    window,
)
from ringcompile.ir.predicate_text import format_predicate

LENGTH = 13


def kept(p: sympy.Basic) -> torch.Tensor:
    return evaluate(p, positions(2, 3, LENGTH), captures(2, LENGTH)).expand(
        2, 3, LENGTH, LENGTH
    )


@settings(deadline=None, max_examples=40)
@given(predicates, predicates)
def test_joins_mean_what_they_say(p: sympy.Basic, r: sympy.Basic) -> None:
    assert torch.equal(kept(conjunction(p, r)), kept(p) & kept(r))
    assert torch.equal(kept(disjunction(p, r)), kept(p) | kept(r))
    assert torch.equal(kept(negate(p)), ~kept(p))


@settings(deadline=None, max_examples=40)
@given(predicates)
def test_a_normal_form_is_its_own(p: sympy.Basic) -> None:
    assert torch.equal(kept(canonicalize(p)), kept(p))
    assert negate(negate(p)) == p


@settings(deadline=None, max_examples=30)
@given(st.integers(-3, 3), st.integers(-3, 3), st.integers(-9, 9), st.integers(1, 5))
def test_sympys_own_relations_are_read(a: int, b: int, c: int, n: int) -> None:
    at = positions(1, 1, LENGTH)
    _, _, q, k = at
    for name in ("ge", "gt", "le", "lt", "eq", "ne"):
        relation = getattr(sympy, name.capitalize())
        p = canonicalize(relation(a * Q + b * floor(K / n) + c, K, evaluate=False))
        want = getattr(operator, name)(a * q + b * (k // n) + c, k)
        assert torch.equal(evaluate(p, at).expand(LENGTH, LENGTH), want)


@pytest.mark.parametrize(
    ("spelling", "same"),
    [
        (K < Q + 1, causal()),
        (sympy.Not(K > Q), causal()),
        (sympy.Ge(2 * Q + 1, 2 * K), causal()),
        ((K <= Q) & (K > Q - 8), conjunction(causal(), window(7))),
        ((Q - K < 8) & (Q - K < 12) & (K <= Q), conjunction(causal(), window(7))),
        (sympy.Abs(Q - K) <= 3, window(3, 3)),
        (sympy.Max(Q - K, K - Q) <= 3, window(3, 3)),
        (K < 5, prefix(5)),
        (sympy.Eq(floor(K / 4), floor(Q / 4)), chunked(4)),
        (sympy.Eq(Q - sympy.Mod(Q, 4), K - sympy.Mod(K, 4)), chunked(4)),
        ((4 * floor(Q / 4) <= K) & (4 * floor(Q / 4) + 4 > K), chunked(4)),
        (sympy.Eq(capture(0, B, K), capture(0, B, Q)), documents(0)),
        (sympy.Ne(capture(1, B, K), 0), key_padding(1)),
        (sympy.Not(sympy.Eq(capture(1, B, K), 0)), key_padding(1)),
        ((K <= Q) & (Q <= K), equals_zero(Q - K)),
        (
            sympy.Eq(sympy.Mod(K - Q, 4), 0),
            equals_zero(sympy.Mod(Q, 4) - sympy.Mod(K, 4)),
        ),
        (sympy.Eq(sympy.Mod(2 * Q, 4), 2), equals_zero(sympy.Mod(Q + 1, 2))),
        (sympy.Eq(floor(K / 4), 1), (K >= 4) & (K < 8)),
        ((K <= Q) | (K <= Q - 3), causal()),
        ((K <= Q) & ((K <= Q + 2) | (K < 3)), causal()),
        ((K <= Q) & ((K > Q) | (K < 3)), conjunction(causal(), prefix(3))),
        (sympy.ITE(K <= Q, K < 3, sympy.false), conjunction(causal(), prefix(3))),
        ((K <= Q) & (K > Q), FALSE),
        ((K <= Q) | (K > Q), TRUE),
        (sympy.Ge(K, 0, evaluate=False), TRUE),
        (sympy.Eq(sympy.Mod(Q, 4), 5), FALSE),
        (sympy.Eq(2 * Q, 2 * K + 1), FALSE),
    ],
)
def test_spellings_of_one_mask_are_equal(
    spelling: sympy.Basic, same: sympy.Basic
) -> None:
    assert canonicalize(spelling) == canonicalize(same)


def test_predicates_print() -> None:
    mask = Mask(causal(), 2) & window(4095) & documents(0) & key_padding(1)
    heads = equals_zero(sympy.Mod(sympy.Mod(K, 64), 3) - sympy.Mod(H, 3))
    lines = [
        str(Mask()),
        str(mask),
        format_predicate(disjunction(causal(), conjunction(prefix(4), chunked(8)))),
        format_predicate(negate(chunked(8))),
        format_predicate(heads),
        format_predicate(equals_zero(sympy.Mod(Q, 4) - 1)),
        format_predicate(at_least_zero(floor(Q / 4) - floor(K / 4) - 1)),
        format_predicate(FALSE),
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
all
c0[b, k] == c0[b, q] and c1[b, k] != 0 and k <= q and q <= k + 4095
(k // 8 == q // 8 and k <= 3) or k <= q
k // 8 != q // 8
(h - (k % 64)) % 3 == 0
q % 4 == 1
k // 4 < q // 4
none""",
    )


def test_joining_masks_keeps_what_an_empty_row_gives() -> None:
    mask = Mask(causal(), 1, EmptyRow.NAN) & Mask(key_padding(2), 3)
    assert mask == Mask(conjunction(causal(), key_padding(2)), 3, EmptyRow.NAN)


def test_conjuncts_and_captures() -> None:
    assert set(conjuncts(conjunction(causal(), documents(0)))) == {
        causal(),
        documents(0),
    }
    assert conjuncts(TRUE) == ()
    assert conjuncts(disjunction(causal(), prefix(2))) == (
        disjunction(causal(), prefix(2)),
    )
    assert has_captures(documents(0))
    assert not has_captures(causal())


def test_a_constant_predicate_broadcasts() -> None:
    at = positions(1, 1, 4)
    assert bool(evaluate(TRUE, at))
    assert not bool(evaluate(FALSE, at))


def test_captures_are_read_within_their_ends() -> None:
    # The position of a pad: its value does not matter, but it must be readable.
    at = (torch.tensor(0), torch.tensor(0), torch.tensor(9), torch.arange(12))
    ids = torch.tensor([[0, 0, 1, 1]])
    assert evaluate(documents(0), at, [ids]).tolist() == [False] * 2 + [True] * 10
