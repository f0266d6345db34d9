"""Blocks that captures decide: none with a pair left out, none full that is not."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import LAYOUTS, Layout
from ringcompile.ir.mask import (
    B,
    H,
    K,
    Q,
    at_least_zero,
    capture,
    causal,
    chunked,
    conjunction,
    disjunction,
    documents,
    equals_zero,
    key_padding,
    negate,
    window,
)
from ringcompile.lowering.tiles.block_tables import Pairs, find_lists, read_ahead

BLOCK = 8
MASKS: dict[str, Boolean] = {
    "documents": conjunction(causal(), documents(0)),
    "documents, both ways": documents(0),
    "other documents": negate(documents(0)),
    "padding": conjunction(causal(), key_padding(1)),
    "padding or own": disjunction(key_padding(1), equals_zero(Q - K)),
    "window of documents": conjunction(causal(), window(11), documents(0)),
    "a length": at_least_zero(capture(2, B) - 1 - K),
    "a prefix": disjunction(causal(), at_least_zero(capture(2, B) - 1 - K)),
    "by head": at_least_zero(Q - K + 3 * H - capture(2, B)),
    "chunks": conjunction(chunked(12), causal()),
    "every third": conjunction(equals_zero(sympy.Mod(Q - K, 3)), documents(0)),
    "both read": negate(equals_zero(capture(3, Q, K))),
    "scaled": at_least_zero(2 * Q - 3 * K + capture(2, B)),
    "floors": at_least_zero(sympy.floor((Q - K) / 5) - 1),
    "all": sympy.true,
}


def read_lists(pairs: Pairs, keeps: Boolean) -> tuple[Tensor, Tensor]:
    """Which blocks are under the mask, and which are full, ``(B, H, rows, columns)``."""
    lists = list(find_lists(keeps, pairs))
    found = []
    for counts, indices in zip(lists[::2], lists[1::2], strict=True):
        assert counts.dtype == indices.dtype == torch.int32
        columns = torch.arange(indices.shape[-1])
        assert (indices.sort(-1).values == columns).all()
        flags = columns < counts[..., None]
        found.append(torch.zeros_like(flags).scatter(-1, indices.long(), flags))
    partial, full, partial_of_keys, full_of_keys = found
    assert torch.equal(partial_of_keys, partial.mT)
    assert torch.equal(full_of_keys, full.mT)
    return partial, full


def check(keeps: Boolean, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Kept pairs by block; and both kinds of blocks."""
    partial, full = read_lists(pairs, keeps)
    assert not (partial & full).any()
    b, h, q, k = pairs.at
    size = b.shape[0], h.shape[1], q.shape[2], k.shape[3]
    kept = evaluate(keeps, pairs.at, pairs.captures).expand(size)
    rows, columns = -(-size[2] // BLOCK), -(-size[3] // BLOCK)
    for i in range(rows):
        for j in range(columns):
            block = kept[
                ..., i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK
            ].flatten(2)
            is_full = full[:, :, i, j].expand(size[:2])
            is_on = (full | partial)[:, :, i, j].expand(size[:2])
            assert (block.all(-1) | ~is_full).all(), (i, j)
            assert (~block.any(-1) | is_on).all(), (i, j)
    readings = read_ahead(keeps, pairs)
    numbers = (
        b,
        h,
        torch.arange(size[2]).view(1, 1, -1, 1),
        torch.arange(size[3]).view(1, 1, 1, -1),
    )
    again = evaluate(
        readings.keeps, numbers, readings.captures, is_within=readings.is_within
    )
    assert torch.equal(again.expand(size), kept)
    return kept, partial, full


def make_pairs(q: Tensor, k: Tensor, ids: Tensor) -> Pairs:
    batches, heads = ids.shape[0], 2
    b, h = torch.arange(batches), torch.arange(heads)
    at = (
        b.view(-1, 1, 1, 1),
        h.view(1, -1, 1, 1),
        q.view(1, 1, -1, 1),
        k.view(1, 1, 1, -1),
    )
    length = ids.shape[1]
    table = torch.arange(length)[:, None] * torch.arange(length) % 5
    padding = torch.arange(length) < torch.tensor([[length - 9], [length]])[:batches]
    captures = [ids, padding, torch.tensor([5, 30])[:batches], table]
    return Pairs(at, captures, BLOCK)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_no_pair_is_left_out_and_full_blocks_are(name: str, layout: str) -> None:
    length = 60
    cuts = torch.tensor([[0, 7, 8, 31, 59], [16, 17, 18, 40, 41]])
    ids = (torch.arange(length) >= cuts[..., None]).sum(1)
    place = Layout(layout, 2)
    for q_rank, k_rank in ((0, 0), (1, 0), (0, 1)):
        q, k = (
            torch.tensor([p for p in place.positions(r, length) if p < length])
            for r in (q_rank, k_rank)
        )
        check(MASKS[name], make_pairs(q, k, ids))


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.integers(1, 40),
    st.sampled_from(sorted(MASKS)),
)
def test_for_any_numbers(ids: list[int], num_q: int, name: str) -> None:
    length = len(ids)
    q = torch.arange(num_q) * 3 % length
    check(MASKS[name], make_pairs(q, torch.arange(length), torch.tensor([ids])))


def test_documents_leave_out_all_that_they_can() -> None:
    """Sorted numbers are decided block by block, without a block too many."""
    length = 256
    ids = torch.tensor([[16, 40, 64, 200]])
    ids = (torch.arange(length)[None] >= ids.mT).sum(0, keepdim=True)
    at = torch.arange(length)
    kept, partial, full = check(MASKS["documents"], make_pairs(at, at, ids))
    blocks = kept[0, 0].view(32, BLOCK, 32, BLOCK).transpose(1, 2).flatten(2)
    assert torch.equal((partial | full)[0, 0], blocks.any(-1))
    assert torch.equal(full[0, 0], blocks.all(-1))
    assert (partial | full).float().mean() < 0.3


EXTREMES = [-(2**63), 2**63 - 1, -(2**40) - 1, 2**40 + 1, 2**31 - 1, -(2**31), -1, 0]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(EXTREMES), min_size=9, max_size=40),
    st.sampled_from([torch.int64, torch.int32]),
    st.sampled_from(["documents", "documents, both ways", "other documents"]),
)
def test_for_numbers_whose_difference_does_not_fit(
    ids: list[int], dtype: torch.dtype, name: str
) -> None:
    at = torch.arange(len(ids))
    check(MASKS[name], make_pairs(at, at, torch.tensor([ids]).to(dtype)))
