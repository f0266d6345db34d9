"""The normal form says the same, and says it alike."""

import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.logic.boolalg import Boolean

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import (
    FALSE,
    TRUE,
    B,
    H,
    K,
    Q,
    at_least_zero,
    capture,
    causal,
    conjunction,
    disjunction,
    equals_zero,
    negate,
)
from ringcompile.passes.normal_form import normalize

S = 7
LAST = {
    B: sympy.Integer(0),
    H: sympy.Integer(1),
    Q: sympy.Integer(S - 1),
    K: sympy.Integer(S - 1),
}
DOCUMENT = capture(0, Q) - capture(0, K)
ATOMS = st.one_of(
    st.builds(lambda n: at_least_zero(Q - K + n), st.integers(-9, 9)),
    st.builds(lambda n: at_least_zero(n - K), st.integers(-1, 8)),
    st.builds(lambda n: equals_zero(Q - K - n), st.integers(-9, 9)),
    st.builds(
        lambda n: equals_zero(sympy.floor(Q / n) - sympy.floor(K / n)),
        st.integers(2, 4),
    ),
    st.just(equals_zero(DOCUMENT)),
    st.just(at_least_zero(H - 1)),
)
PREDICATES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds(conjunction, inner, inner),
        st.builds(disjunction, inner, inner),
        st.builds(negate, inner),
    ),
    max_leaves=8,
)


def table(p: Boolean) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    at = (
        zero,
        torch.arange(2)[:, None, None],
        torch.arange(S)[:, None],
        torch.arange(S),
    )
    return evaluate(p, at, [torch.tensor([0, 0, 1, 1, 1, 2, 2])]).broadcast_to(2, S, S)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(PREDICATES)
def test_normal_form_is_equal_inside_the_ranges(p: Boolean) -> None:
    assert torch.equal(table(normalize(p, LAST)), table(p))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ATOMS, ATOMS, ATOMS)
def test_distributed_and_factored_read_alike(
    a: Boolean, b: Boolean, c: Boolean
) -> None:
    factored = conjunction(a, disjunction(b, c))
    distributed = disjunction(conjunction(a, b), conjunction(a, c))
    assert normalize(factored, LAST) == normalize(distributed, LAST)


def test_ranges_decide_atoms() -> None:
    assert normalize(at_least_zero(S - 1 - K), LAST) == TRUE
    assert normalize(at_least_zero(K - S), LAST) == FALSE
    assert normalize(negate(equals_zero(Q - K - S)), LAST) == TRUE
    assert normalize(conjunction(causal(), at_least_zero(K - Q + S)), LAST) == causal()


def test_ranges_may_be_symbolic() -> None:
    s = sympy.Symbol("s27", integer=True, positive=True)
    last = {B: sympy.Integer(0), H: sympy.Integer(0), Q: s - 1, K: s - 1}
    assert normalize(at_least_zero(s - 1 - K), last) == TRUE
    assert normalize(at_least_zero(s - K), last) == TRUE
    assert normalize(at_least_zero(s - 2 - K), last) == at_least_zero(s - 2 - K)
