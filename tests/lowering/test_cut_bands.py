"""Windows as dense calls: each pair once, and what each call computes."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import sympy
import torch
from expecttest import assert_expected_inline
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.count_pairs import count_pairs
from support.ranks import RankPool
from support.ring_cases import Case, join, run_cases
from support.sampling import slow
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.distributed import ProcessGroup

from ringcompile import ops
from ringcompile.ir.attention import Dropout, RankPlan
from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import LAYOUTS, Layout, Side
from ringcompile.ir.mask import (
    K,
    Mask,
    Q,
    at_least_zero,
    causal,
    conjunction,
    equals_zero,
    key_padding,
    window,
)
from ringcompile.ir.schedule import Kernel, Piece
from ringcompile.ir.text import format_plan, parse_mask
from ringcompile.lowering.calls import Call, rows
from ringcompile.lowering.cut_bands import ANY_WIDTH, Band, cut_band, cut_window
from ringcompile.lowering.program import build_program
from ringcompile.lowering.tiles.dense import attend, attend_backward
from ringcompile.lowering.tiles.pieces import View
from ringcompile.plan.stages import build_schedule
from ringcompile.plan.tiles import build_tile


@settings(deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(-45, 45), st.integers(-45, 45)
)
def test_each_pair_of_a_band_is_in_one_call(
    num_q: int, num_kv: int, least: int, most: int
) -> None:
    apart = torch.arange(num_q)[:, None] - torch.arange(num_kv)
    want = ((apart >= least) & (apart <= most)).long()
    found = count_pairs(cut_band(Band(least, most), num_q, num_kv), num_q, num_kv)
    assert torch.equal(found, want)


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(-5, 5),
    st.integers(0, 4),
    st.sampled_from([(1, 1), (4, 1), (1, 4), (4, 4), (2, 4)]),
)
def test_each_pair_of_a_band_with_stairs_is_in_one_call(
    num_q: int, num_kv: int, least: int, more: int, steps: tuple[int, int]
) -> None:
    i, j = torch.arange(num_q * 4)[:, None], torch.arange(num_kv * 4)
    low, high = least * 4, (least + more) * 4
    above, below = (i // n - j // n for n in steps)
    want = ((above >= low // steps[0]) & (below <= high // steps[1])).long()
    band = Band(low, high - (steps[1] > 1), *steps)
    assume(band.width > 0)
    calls = cut_band(band, num_q * 4, num_kv * 4)
    assert torch.equal(count_pairs(calls, num_q * 4, num_kv * 4), want)


def test_a_window_of_blocks_is_one_of_rows_and_a_triangle_for_each_block() -> None:
    calls = cut_band(Band(0, 15, 1, 8), 64, 64)
    assert_expected_inline(
        _describe(calls),
        """\
4 x causal q 0:64 kv 0:64
3 x upper q 16:63 kv 1:48
6 x causal q 16:64 kv 0:48""",
    )
    assert [c.runs for c in calls] == [(16, 16), (15, 15), (8, 8)]


def _describe(calls: Iterable[Call]) -> str:
    return "\n".join(
        f"{c.groups} x {'upper' if c.is_upper else c.kernel.value} q {c.q} kv {c.kv}"
        for c in calls
    )


def test_a_window_is_two_batches_of_triangles() -> None:
    calls = cut_band(Band(0, 15), 64, 64)
    assert_expected_inline(
        _describe(calls),
        """\
4 x causal q 0:64 kv 0:64
3 x upper q 16:63 kv 1:48""",
    )
    assert [c.runs for c in calls] == [(16, 16), (15, 15)]


def test_a_window_of_odd_length_has_two_triangles_of_an_even_side() -> None:
    calls = cut_band(Band(0, 16), 64, 64)
    assert_expected_inline(
        _describe(calls),
        """\
4 x causal q 0:64 kv 0:64
3 x upper q 16:64 kv 0:48""",
    )
    assert [c.runs for c in calls] == [(16, 16), (16, 16)]


def test_the_shard_before_is_seen_by_one_triangle() -> None:
    calls = cut_band(Band(-64, -49), 15, 64)
    assert_expected_inline(_describe(calls), """1 x upper q 0:15 kv 49:64""")


def _every(n: int) -> Boolean:
    return equals_zero(sympy.Mod(Q - K, n))


def _blocks(before: int, behind: int) -> Boolean:
    apart = sympy.floor(Q / 4) - sympy.floor(K / 4)
    return conjunction(at_least_zero(before - apart), at_least_zero(apart + behind))


MASKS = {
    "causal window": conjunction(causal(), window(left=7)),
    "both sides": window(left=5, right=9),
    "behind": window(left=11, right=-3),
    "causal": causal(),
    "dilated": conjunction(causal(), window(left=12), _every(4)),
    "dilated, both sides": conjunction(window(left=12, right=9), _every(3)),
    "window of blocks": _blocks(1, 1),
    "causal window of blocks": conjunction(causal(), _blocks(2, 2)),
    "sums": conjunction(causal(), at_least_zero(Q + K - 10)),
    "half": at_least_zero(Q - 2 * K),
    "unlike blocks": at_least_zero(sympy.floor(Q / 8) - sympy.floor(K / 4)),
    "blocks and rows": at_least_zero(sympy.floor(Q / 8) - K),
    "blocks behind an edge": conjunction(_blocks(3, 0), window(left=-2)),
    "blocks before an edge": conjunction(_blocks(3, 0), window(left=5)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("cp_size", "length"), [(1, 40), (2, 64), (3, 61), (4, 96)])
@pytest.mark.parametrize("least_width", [2, ANY_WIDTH])
def test_calls_of_all_tiles_are_the_mask(
    layout: str, mask: str, cp_size: int, length: int, least_width: int
) -> None:
    curve = (16, 2) if layout == "hilbert" else ()
    keeps, where = MASKS[mask], Layout(layout, cp_size, *curve)
    side = Side(where, length)
    chunk = where.chunk_size(length)
    total = torch.zeros(length, length, dtype=torch.int64)
    cut_some = False
    for q_rank in range(cp_size):
        for kv_rank in range(cp_size):
            tile = build_tile(Mask(keeps), where, q_rank, kv_rank, length)
            places = [
                where.position_tensor(r, chunk, length=length)
                for r in (q_rank, kv_rank)
            ]
            for piece in tile.pieces:
                calls = cut_window(
                    *(piece, keeps, (side, side), (q_rank, kv_rank)),
                    least_width=least_width,
                )
                if calls is None:
                    rows = (
                        slice(*piece.q.resolve(chunk)),
                        slice(*piece.kv.resolve(chunk)),
                    )
                    q, k = (p[r] for p, r in zip(places, rows, strict=True))
                    found = _of_piece(piece, keeps, q, k)
                    total[q[:, None], k] += found
                    continue
                cut_some = True
                q, k = (p[p < length] for p in places)
                count_masked = partial(_count_first_class, q, k)
                total[q[:, None], k] += count_pairs(calls, len(q), len(k), count_masked)
    at = torch.arange(length)
    zero = torch.zeros((), dtype=torch.int64)
    want = evaluate(keeps, (zero, zero, at[:, None], at), ())
    assert torch.equal(total, want.expand(length, length).long())
    is_cut = layout != "hilbert" and ("window" in mask or "edge" in mask)
    if least_width == ANY_WIDTH:
        is_cut = layout == "contiguous" and mask == "dilated" and length != 61
    if "blocks" in mask:  # chunks are whole ones
        is_cut &= layout == "contiguous" and length % (4 * cp_size) == 0
    assert cut_some or not is_cut


def _count_first_class(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """Of a call under a mask the pairs of a class: those that the first class has."""
    assert call.classes > 1
    assert call.mask is not None
    of_q, of_k = (
        at[of.start[1] : of.stop[1] : call.classes]
        for at, of in ((q, call.q), (k, call.kv))
    )
    keeps = parse_mask(call.mask).keeps
    zero = torch.zeros((), dtype=torch.int64)
    return evaluate(keeps, (zero, zero, of_q[:, None], of_k), ()).long()


def _of_piece(piece: Piece, keeps: object, q: Tensor, k: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    if piece.kernel is Kernel.CAUSAL:
        return torch.ones(len(q), len(k), dtype=torch.int64).tril()
    if piece.kernel is Kernel.FULL:
        return torch.ones(len(q), len(k), dtype=torch.int64)
    return evaluate(keeps, (zero, zero, q[:, None], k), ()).long()


def test_what_captures_decide_stays_masked() -> None:
    layout = Layout("contiguous", 1)
    keeps = conjunction(causal(), window(left=7), key_padding(0))
    (piece,) = build_tile(Mask(keeps, 1), layout, 0, 0, 64).pieces
    side = Side(layout, 64)
    assert cut_window(piece, keeps, (side, side), (0, 0), least_width=2) is None


def test_a_dilated_window_is_cut_by_class() -> None:
    layout, keeps = Layout("contiguous", 2), MASKS["dilated"]
    side = Side(layout, 64)
    for ranks, want in (((0, 0), 2), ((1, 0), 1)):
        (piece,) = build_tile(Mask(keeps), layout, *ranks, 64).pieces
        calls = cut_window(piece, keeps, (side, side), ranks, least_width=4)
        assert calls is not None
        assert len(calls) == want
        for call in calls:
            assert isinstance(call, Call)
            assert call.classes == 4


def test_a_dilated_window_has_as_many_classes_as_a_stripe_has_residues() -> None:
    """Every other row: two of four; every fourth: one, a window as any."""
    keeps = MASKS["dilated"]
    for cp_size, classes in ((2, 2), (4, 1), (3, 4)):
        layout = Layout("striped", cp_size)
        side = Side(layout, 32 * cp_size)
        (piece,) = build_tile(Mask(keeps), layout, 0, 0, 32 * cp_size).pieces
        calls = cut_window(piece, keeps, (side, side), (0, 0), least_width=2)
        assert calls is not None
        assert {call.classes for call in calls} == {classes}
        assert all(call.kernel is not Kernel.MASKED for call in calls)


def test_a_narrow_dilated_window_is_one_call_whose_classes_are_a_batch() -> None:
    layout, keeps = Layout("contiguous", 2), MASKS["dilated"]
    side = Side(layout, 64)
    (piece,) = build_tile(Mask(keeps), layout, 1, 1, 64).pieces
    calls = cut_window(piece, keeps, (side, side), (1, 1), least_width=5)
    assert calls is not None
    (call,) = calls
    assert (call.kernel, call.classes) == (Kernel.MASKED, 4)
    assert [of.resolve(32) for of in (call.q, call.kv)] == [(0, 32), (0, 32)]
    assert call.mask is not None
    assert_expected_inline(
        str(parse_mask(call.mask)),
        """k <= q and q <= k + 12""",
    )
    of_some = cut_window(
        *(piece, keeps, (side, side), (1, 1)), least_width=5, may_be_narrow=False
    )
    assert of_some is None


def test_a_narrow_window_stays_masked() -> None:
    layout, keeps = Layout("contiguous", 1), MASKS["causal window"]
    (piece,) = build_tile(Mask(keeps), layout, 0, 0, 64).pieces
    side = Side(layout, 64)
    assert cut_window(piece, keeps, (side, side), (0, 0), least_width=9) is None
    calls = cut_window(piece, keeps, (side, side), (0, 0), least_width=8)
    assert calls is not None
    assert len(calls) == 2


@pytest.mark.parametrize("is_upper", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_a_batch_of_triangles_computes_what_it_says(
    num_kv_heads: int, classes: int, *, is_upper: bool
) -> None:
    call = cut_band(Band(0, 3), 12, 12)[is_upper]
    expected = (True, 2, 1) if is_upper else (False, 3, 0)
    assert (call.is_upper, call.groups, call.gap) == expected
    if classes > 1:
        of_q, of_kv = (
            rows(classes * of.start[1], classes * of.stop[1])
            for of in (call.q, call.kv)
        )
        call = replace(call, q=of_q, kv=of_kv, classes=classes)
    n = call.q.stop[1] - call.q.start[1]
    random = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 2, n, 8, generator=random).double() for _ in range(2))
    k, v = (
        torch.randn(2, num_kv_heads, n, 8, generator=random).double() for _ in range(2)
    )
    kept = count_pairs([call], 12 * classes, 12 * classes)[
        call.q.start[1] : call.q.stop[1], call.kv.start[1] : call.kv.stop[1]
    ].bool()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    wide = [x.repeat_interleave(2 // num_kv_heads, 1) for x in (k, v)]
    scores = (0.5 * q @ wide[0].mT).masked_fill(~kept, -torch.inf)
    want_lse = scores.logsumexp(-1)
    weights = torch.where(kept, scores.softmax(-1), 0.0)
    want = weights @ wide[1]
    want_grads = torch.autograd.grad(want, inputs, grad)
    view = View.of(call, q)
    with torch.no_grad():
        kernel = partial(attend, is_causal=True, scale=0.5)
        out, lse = view.put_queries(*view.call_kernel(kernel, (q, k, v)))
        torch.testing.assert_close(out, want.detach())
        torch.testing.assert_close(lse, want_lse.detach())
        saved = torch.where(lse == -torch.inf, torch.inf, lse)
        backward = partial(attend_backward, is_causal=True, scale=0.5)
        tensors = (grad, q, k, v, out, saved)
        grads = view.put_gradients(*view.call_kernel(backward, tensors))
    for found, wanted in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(found, wanted)


def run_unmasked(
    group: ProcessGroup, rank: int, cases: tuple[Case, ...]
) -> list[tuple[Tensor | None, ...]]:
    """A kernel with a mask is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a kernel with a mask")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("MASKED_ATTENTION", "MASKED_ATTENTION_BACKWARD"):
            patch.setattr(ops, name, refuse)
        return run_cases(group, rank, cases)


@pytest.mark.parametrize("cp_size", [slow(1), 2, slow(3)])
def test_rings_take_no_kernel_with_a_mask(ranks: RankPool, cp_size: int) -> None:
    heads = (4, 2, 16, 16)
    cases = tuple(
        Case(mask, layout, S, heads, dtype, compile=compiler)
        for mask, layout, S, dtype, compiler in (
            ("wide window", "contiguous", 108, torch.float32, "eager"),
            ("wide window", "zigzag", 107, torch.float64, "eager"),
            ("dilated window", "contiguous", 108, torch.float32, "expanded"),
            ("wide window", "striped", 108, torch.float32, "expanded"),
            ("window of every fourth", "striped", 108, torch.float32, "eager"),
            ("wide blocks", "contiguous", 144, torch.float64, "eager"),
            ("wide blocks", "zigzag", 96, torch.float32, "expanded"),
        )
        if layout != "striped" or cp_size == (1 if mask == "wide window" else 2)
    )
    by_rank = ranks.run(run_unmasked, cases, world_size=cp_size)
    for case, *shards in zip(cases, *by_rank, strict=True):
        for n, want in enumerate(case.expected()):
            got = join(case, [s[n] for s in shards]).double()
            assert (got - want).abs().max() <= 3e-6 * want.abs().max(), (case, n)


def run_noting_batches(
    group: ProcessGroup, rank: int, cases: tuple[Case, ...]
) -> tuple[list[tuple[Tensor | None, ...]], set[int]]:
    """And how many batches kernels with a mask are given."""
    batches = set[int]()
    names = {"MASKED_ATTENTION": 0, "MASKED_ATTENTION_BACKWARD": 1}
    real = {name: getattr(ops, name) for name in names}

    def note(name: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        batches.add(args[names[name]].shape[0])
        return real[name](*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(ops, name, partial(note, name))
        return run_cases(group, rank, cases), batches


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_classes_of_a_narrow_window_are_batches(ranks: RankPool, cp_size: int) -> None:
    cases = tuple(
        Case("narrow dilated window", layout, 108, (4, 2, 16, 16), dtype)
        for layout, dtype in (
            ("contiguous", torch.float64),
            ("zigzag", torch.float32),
            ("contiguous", torch.bfloat16),
        )
    )
    by_rank = ranks.run(run_noting_batches, cases, world_size=cp_size)
    limits = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2}
    for n, case in enumerate(cases):
        size = case.tensors()[0].shape[0]
        assert [batches for _, batches in by_rank] == [{3 * size}] * cp_size
        shards = [found[n] for found, _ in by_rank]
        for m, want in enumerate(case.expected()):
            got = join(case, [s[m] for s in shards]).double()
            error = (got - want).abs().max() / want.abs().max()
            assert error <= limits[case.dtype], (case, m)


@pytest.mark.parametrize(
    ("options", "is_cut"),
    [
        ({}, True),
        ({"block_order": "hilbert"}, False),
        ({"kernel": "math"}, False),
        ({"kernel": "flex"}, False),
        ({"softcap": 2.0}, False),
        ({"dropout": Dropout(0.1, 0)}, False),
    ],
)
def test_only_kernels_without_a_mask_are_given_triangles(
    options: dict[str, Any], is_cut: bool
) -> None:
    parts = ((Mask(conjunction(causal(), window(left=15))), None),)
    schedule = build_schedule(parts, Layout("contiguous", 1), 64)
    plan = RankPlan(0, "test", 0, "", 1.0, 60.0, schedule, "", **options)
    x = torch.zeros(1, 2, 64, 8)
    (part,) = build_program(format_plan(plan), x, x, ())
    ((tile,),) = part.stages
    assert len(tile.pieces) == (2 if is_cut else 1)
    assert all(isinstance(piece, Call) is is_cut for piece in tile.pieces)


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_runs_of_a_class_are_read_where_they_lie(classes: int) -> None:
    lower, upper = (
        replace(
            call,
            q=rows(0, 12 * classes),
            kv=rows(0, 12 * classes),
            classes=classes,
            groups=3,
            gap=0,
        )
        for call in cut_band(Band(0, 3), 12, 12)
    )
    x = torch.arange(12.0 * classes * 4).view(1, -1, 2, 2).transpose(1, 2)
    calls: list[Tensor] = []

    def kernel(x: Tensor) -> tuple[Tensor]:
        calls.append(x)
        return (x,)

    for call in (lower, upper):
        calls.clear()
        view = View.of(call, x)
        (found,) = view.call_kernel(kernel, (x,))
        torch.testing.assert_close(found, view.take(x))
        if not call.is_upper:
            assert len(calls) == classes
            memory = {y.untyped_storage().data_ptr() for y in calls}
            assert memory == {x.untyped_storage().data_ptr()}
