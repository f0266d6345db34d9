import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import captures, predicates

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import (
    H,
    K,
    Q,
    causal,
    chunked,
    conjunction,
    disjunction,
    documents,
    equals_zero,
    key_padding,
    negate,
    prefix,
    window,
)
from ringcompile.ir.schedule import Coverage
from ringcompile.plan.coverage import (
    DependsOnLength,
    Span,
    find_coverage,
    is_at_least_zero,
)

spans = st.builds(
    lambda start, stride, count: Span((0, start), stride, (0, count)),
    st.integers(0, 20),
    st.integers(1, 5),
    st.integers(1, 8),
)
# Positions affine in the chunk length, as a layout makes them.
symbolic_spans = st.builds(
    lambda chunks, row, stride: Span((chunks, row), stride, (1, 0)),
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(1, 4),
)


def resolve(span: Span, chunk: int) -> torch.Tensor:
    start, count = (e[0] * chunk + e[1] for e in (span.start, span.count))
    return start + span.stride * torch.arange(count)


def kept(p: sympy.Basic, q: Span, k: Span, chunk: int = 0) -> torch.Tensor:
    """The box, for three heads and several values of the captures."""
    at_q, at_k = resolve(q, chunk), resolve(k, chunk)
    length = int(max(at_q.max(), at_k.max())) + 1
    place = (torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None])
    tries = [
        evaluate(p, (*place, at_q[:, None], at_k), captures(2, length, seed)).expand(
            2, 3, len(at_q), len(at_k)
        )
        for seed in range(3)
    ]
    return torch.stack(tries)


def brute_force(p: sympy.Basic, q: Span, k: Span, chunk: int = 0) -> Coverage:
    pairs = kept(p, q, k, chunk)
    if bool(pairs.all()):
        return Coverage.FULL
    return Coverage.PARTIAL if bool(pairs.any()) else Coverage.EMPTY


def assert_sound(p: sympy.Basic, q: Span, k: Span, chunk: int = 0) -> None:
    decision = find_coverage(p, q, k)
    if decision.coverage is not Coverage.PARTIAL:
        assert brute_force(p, q, k, chunk) is decision.coverage
        return
    left = conjunction(*decision.undecided)
    assert torch.equal(kept(left, q, k, chunk), kept(p, q, k, chunk))


@settings(deadline=None, max_examples=150)
@given(predicates, spans, spans)
def test_empty_and_full_are_never_wrong(p: sympy.Basic, q: Span, k: Span) -> None:
    assert_sound(p, q, k)


@settings(deadline=None, max_examples=80)
@given(predicates, symbolic_spans, symbolic_spans)
def test_nor_are_they_for_any_length(p: sympy.Basic, q: Span, k: Span) -> None:
    try:
        find_coverage(p, q, k)
    except DependsOnLength:
        return
    for chunk in (2, 3, 7):
        assert_sound(p, q, k, chunk)


@settings(deadline=None, max_examples=60)
@given(spans, spans, st.integers(1, 8))
def test_bounds_of_one_linear_form_are_exact(q: Span, k: Span, n: int) -> None:
    # Of two ranks of one layout, as the strides are then the same.
    k = Span(k.start, q.stride, k.count)
    for p in (causal(), window(n, 0), window(n, n), window(n), prefix(n)):
        assert find_coverage(p, q, k).coverage is brute_force(p, q, k)


@settings(deadline=None, max_examples=60)
@given(spans, spans, st.integers(1, 8))
def test_chunks_are_exact_unless_a_stride_jumps_over_one(
    q: Span, k: Span, n: int
) -> None:
    k = Span(k.start, q.stride, k.count)
    if n >= q.stride or q.stride % n == 0:
        assert find_coverage(chunked(n), q, k).coverage is brute_force(chunked(n), q, k)


@settings(deadline=None, max_examples=60)
@given(spans, spans, st.integers(1, 5))
def test_residues_are_exact_where_the_stride_is_a_multiple(
    q: Span, k: Span, n: int
) -> None:
    q, k = Span(q.start, 2 * n, q.count), Span(k.start, n, k.count)
    p = equals_zero(sympy.Mod(Q - K, n))
    assert find_coverage(p, q, k).coverage is brute_force(p, q, k)


WHOLE = Span((0, 0), 1, (0, 10))
LATER = Span((0, 10), 1, (0, 10))


def test_captures_are_partial_unless_another_conjunct_decides() -> None:
    p = conjunction(causal(), documents(0), key_padding(1))
    assert find_coverage(p, WHOLE, LATER).coverage is Coverage.EMPTY
    later = find_coverage(p, LATER, WHOLE)
    assert later.coverage is Coverage.PARTIAL
    assert set(later.undecided) == {documents(0), key_padding(1)}


def test_of_a_disjunction_the_open_choices_are_left() -> None:
    p = disjunction(conjunction(negate(causal()), documents(0)), key_padding(1))
    assert find_coverage(p, LATER, WHOLE).undecided == (key_padding(1),)
    assert (
        find_coverage(disjunction(p, causal()), LATER, WHOLE).coverage is Coverage.FULL
    )


def test_heads_leave_a_box_open() -> None:
    p = equals_zero(sympy.Mod(K, 4) - sympy.Mod(H, 4))
    assert find_coverage(p, WHOLE, WHOLE).coverage is Coverage.PARTIAL
    one = Span((0, 5), 4, (0, 9))
    assert (
        find_coverage(equals_zero(sympy.Mod(K, 4) - 1), WHOLE, one).coverage
        is Coverage.FULL
    )


@pytest.mark.parametrize(
    ("edge", "sign"),
    [
        ((0, 0), True),
        ((0, -1), False),
        ((1, -2), True),
        ((1, -3), None),
        ((-1, 1), False),
        ((-1, 2), None),
    ],
)
def test_signs_for_every_chunk_of_two_tokens_or_more(
    edge: tuple[int, int], sign: bool | None
) -> None:
    assert is_at_least_zero(edge) is sign


def test_what_depends_on_the_length_says_so() -> None:
    chunk = Span((0, 0), 1, (1, 0))
    following = Span((1, 0), 1, (1, 0))
    assert find_coverage(causal(), following, chunk).coverage is Coverage.FULL
    with pytest.raises(DependsOnLength, match="depends on the sequence length"):
        find_coverage(window(8, 0), following, chunk)
    # Another conjunct decides for every length.
    assert find_coverage(window(8, 0), chunk, following).coverage is Coverage.EMPTY
