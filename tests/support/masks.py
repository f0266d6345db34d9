"""Random masks, captures and layouts for property tests."""

import sympy
import torch
from hypothesis import strategies as st
from torch import Tensor

from ringcompile.ir.layout import LAYOUTS, Layout
from ringcompile.ir.mask import (
    FALSE,
    TRUE,
    H,
    K,
    Mask,
    Q,
    at_least_zero,
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

NUM_CAPTURES = 2


def _dilated(n: int, d: int) -> sympy.Basic:
    return conjunction(equals_zero(sympy.Mod(Q - K, d)), window(n * d, n * d))


def _near_blocks(n: int, b: int) -> sympy.Basic:
    apart = sympy.floor(Q / b) - sympy.floor(K / b)
    return at_least_zero(n - sympy.Abs(apart))


def _per_head(w: int, r: int) -> sympy.Basic:
    return equals_zero(sympy.Mod(sympy.Mod(K, w), r) - sympy.Mod(H, r))


small = st.integers(1, 9)
static_atoms = st.one_of(
    st.just(causal()),
    st.just(TRUE),
    st.just(FALSE),
    st.builds(window, small, st.integers(-1, 5)),
    st.builds(prefix, small),
    st.builds(chunked, small),
    st.builds(_dilated, small, st.integers(1, 4)),
    st.builds(_near_blocks, st.integers(0, 2), small),
    st.builds(lambda n: at_least_zero(Q - 2 * K + n), small),
)
atoms = st.one_of(
    static_atoms,
    st.builds(_per_head, small, st.integers(1, 4)),
    st.just(documents(0)),
    st.just(key_padding(1)),
)


def _joined(of: st.SearchStrategy[sympy.Basic]) -> st.SearchStrategy[sympy.Basic]:
    return st.one_of(
        st.builds(conjunction, of, of),
        st.builds(disjunction, of, of),
        st.builds(negate, of),
    )


predicates = st.recursive(atoms, _joined, max_leaves=4)
static_predicates = st.recursive(static_atoms, _joined, max_leaves=4)
masks = st.builds(lambda p: Mask(p, NUM_CAPTURES), predicates)


def layouts(max_ranks: int) -> st.SearchStrategy[Layout]:
    ranks = st.integers(1, max_ranks)
    segments = st.one_of(st.none(), st.integers(1, 30))
    return st.one_of(
        st.builds(Layout, st.sampled_from(LAYOUTS), ranks),
        st.builds(Layout, st.just("hilbert"), ranks, segments),
    )


def captures(num_batches: int, length: int, seed: int = 0) -> list[Tensor]:
    """Document ids and a key padding mask, ``(B, S)`` each."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 3, (num_batches, length), generator=random)
    return [
        ids.sort(1).values,
        torch.randint(0, 2, (num_batches, length), generator=random),
    ]


def positions(num_batches: int, num_heads: int, length: int) -> tuple[Tensor, ...]:
    """``(b, h, q, k)`` that broadcast to ``(B, H, S, S)``."""
    return (
        torch.arange(num_batches)[:, None, None, None],
        torch.arange(num_heads)[:, None, None],
        torch.arange(length)[:, None],
        torch.arange(length),
    )
