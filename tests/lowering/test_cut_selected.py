"""Calls over selected rows: each pair once, and dense where segments allow it."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import LAYOUTS, Layout
from ringcompile.ir.mask import Mask, causal, key_padding
from ringcompile.ir.schedule import Kernel, Selection
from ringcompile.ir.text import format_mask
from ringcompile.lowering.calls import Call
from ringcompile.lowering.cut_selected import Compact, cut_selected
from ringcompile.lowering.selected import TableSpec
from ringcompile.patterns import (
    AttentionSpec,
    ConsecutiveDilated,
    GroupedDilated,
    LocalWindow,
    LongNet,
    Pattern,
)

PATTERNS: dict[str, Pattern] = {
    "longnet": LongNet((8, 24, 48), (1, 2, 4)),
    "uneven": LongNet((6, 7, 100), (4, 3, 7)),
    "kv_head": LongNet((16,), (2,), offset="kv_head"),
    "grouped": GroupedDilated((8, 24, 60), (1, 2, 4)),
    "consecutive": ConsecutiveDilated((9, 20, 11), (1, 2, 4)),
    "local and longnet": LocalWindow(16, 4) & LongNet((8, 24), (1, 2)),
}


def compact(
    selection: Selection, layout: Layout, length: int, ranks: tuple[int, int]
) -> Compact:
    q_rank, kv_rank = ranks
    return Compact(
        TableSpec(selection, layout, length, q_rank, None).positions(),
        TableSpec(selection, layout, length, kv_rank, q_rank).positions(),
    )


def count_pairs(calls: tuple[Call, ...], mask: Mask, at: Compact) -> Tensor:
    """How often each pair of compact rows is computed, ``(H, n, m)``."""
    q, kv = (torch.tensor(rows) for rows in (at.q, at.kv))
    H, n = q.shape
    kv = kv.repeat_interleave(H // len(kv), 0)
    total = torch.zeros(H, n, kv.shape[1], dtype=torch.int64)
    for call in calls:
        assert call.groups == 1 or call.kernel is not Kernel.MASKED
        heads = slice(*(call.heads or (0, H)))
        sizes = [(r.stop[1] - r.start[1]) // call.groups for r in (call.q, call.kv)]
        for g in range(call.groups):
            rows, columns = (
                torch.arange(r.start[1] + g * size, r.start[1] + (g + 1) * size)
                for r, size in zip((call.q, call.kv), sizes, strict=True)
            )
            found = torch.ones(H, len(rows), len(columns), dtype=torch.int64)
            if call.kernel is Kernel.CAUSAL:
                assert len(rows) == len(columns)
                found = found.tril()
            if call.kernel is Kernel.MASKED:
                found = kept(mask, q[:, rows], kv[:, columns]).long()
            for h in range(H)[heads]:
                total[h, rows[:, None], columns] += found[h]
    return total


def kept(mask: Mask, q: Tensor, kv: Tensor) -> Tensor:
    """Which pairs of rows at these positions count, ``(H, n, m)``."""
    H, n = q.shape
    h = torch.arange(H)[:, None, None]
    at = (torch.zeros(1, dtype=torch.int64), h, q[:, :, None], kv[:, None])
    found = evaluate(mask.keeps, at).expand(H, n, kv.shape[1])
    return found & (q >= 0)[:, :, None] & (kv >= 0)[:, None]


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pair_is_in_one_call(name: str, *, is_causal: bool) -> None:
    for length in (48, 43):
        for H, G in ((4, 4), (4, 2), (5, 1)):
            spec = AttentionSpec(H, G, length, is_causal)
            user = Mask(causal()) if is_causal else Mask()
            for mask, selection in PATTERNS[name].build_parts(user, spec):
                if selection is None:
                    continue
                for layout in (Layout(x, 2) for x in LAYOUTS):
                    for ranks in ((0, 0), (1, 0), (0, 1), (1, 1)):
                        at = compact(selection, layout, length, ranks)
                        calls = cut_selected(format_mask(mask), selection, at)
                        q, kv = (torch.tensor(rows) for rows in (at.q, at.kv))
                        kv = kv.repeat_interleave(H // len(kv), 0)
                        want = kept(mask, q, kv).long()
                        got = count_pairs(calls, mask, at)
                        assert torch.equal(got, want), (mask, layout, ranks, calls)


def test_aligned_segments_are_one_batched_call() -> None:
    """H = G: each head has rows of its own, and no mask is left."""
    texts = []
    for pattern in (LongNet((8, 32), (1, 4)), GroupedDilated((8, 32), (1, 4))):
        parts = pattern.build_parts(Mask(causal()), AttentionSpec(4, 4, 64, True))
        for mask, selection in parts:
            assert selection is not None
            for ranks in ((0, 0), (1, 1)):
                at = compact(selection, Layout("contiguous", 2), 64, ranks)
                for c in cut_selected(format_mask(mask), selection, at):
                    texts.append(
                        f"{ranks} rate {selection.rate}: {c.groups} x {c.kernel.value}"
                        f" {c.q} x {c.kv} heads {c.heads}"
                    )
    assert_expected_inline(
        "\n".join(texts),
        """\
(0, 0) rate 1: 4 x causal 0:32 x 0:32 heads None
(1, 1) rate 1: 4 x causal 0:32 x 0:32 heads None
(0, 0) rate 4: 1 x causal 0:8 x 0:8 heads None
(1, 1) rate 4: 1 x causal 0:8 x 0:8 heads None
(0, 0) rate 1: 4 x causal 0:32 x 0:32 heads (0, 2)
(1, 1) rate 1: 4 x causal 0:32 x 0:32 heads (0, 2)
(0, 0) rate 4: 1 x causal 0:8 x 0:8 heads (2, 4)
(1, 1) rate 4: 1 x causal 0:8 x 0:8 heads (2, 4)""",
    )


def test_what_hangs_on_captures_or_shared_keys_is_masked() -> None:
    spec = AttentionSpec(4, 2, 64)
    for mask, pattern in (
        (Mask(key_padding(0), 1), LongNet((32,), (4,), offset="kv_head")),
        (Mask(), LongNet((32,), (4,))),  # two offsets for each KV head
    ):
        ((whole, selection),) = pattern.build_parts(mask, spec)
        assert selection is not None
        at = compact(selection, Layout("contiguous", 2), 64, (0, 0))
        (call,) = cut_selected(format_mask(whole), selection, at)
        assert call.kernel is Kernel.MASKED
