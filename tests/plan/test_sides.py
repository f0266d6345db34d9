"""Schedules of queries and keys of two sequences, simulated and checked."""

import dataclasses

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import captures, layouts, masks

from ringcompile import reference
from ringcompile.errors import PlanError
from ringcompile.ir.layout import LAYOUTS, Layout, Side
from ringcompile.ir.mask import TRUE, Mask, causal, documents, key_padding, window
from ringcompile.ir.schedule import Coverage, Schedule
from ringcompile.plan.check import check_schedule
from ringcompile.plan.choose import Crossing, choose_layout
from ringcompile.plan.cost import CPU, Sizes, estimate_seconds
from ringcompile.plan.coverage import DependsOnLength
from ringcompile.plan.simulate import simulate
from ringcompile.plan.stages import build_schedule
from ringcompile.plan.tiles import build_tile
from ringcompile.plan.traffic import LENGTH, bytes_per_rank

B, H, G, D, E = 2, 4, 2, 4, 3
NAMES = ("out", "lse", "dq", "dk", "dv")


def assert_simulates(schedule: Schedule, mask: Mask, length: int, keys: int) -> None:
    check_schedule(schedule)
    random = torch.Generator().manual_seed(length)
    sizes = ((H, length, D), (G, keys, D), (G, keys, E), (H, length, E))
    q, k, v, grad = (
        torch.randn(B, *s, generator=random, dtype=torch.float64) for s in sizes
    )
    reads = captures(B, max(length, keys))
    got = simulate(schedule, q, k, v, grad_out=grad, captures=reads)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = reference.attention(*inputs, mask=mask, captures=reads)
    lse = reference.log_sum_exp(q, k, mask=mask, captures=reads)
    grads = torch.autograd.grad(out, inputs, grad)
    for name, want in zip(NAMES, (out, lse, *grads), strict=True):
        error = (getattr(got, name) - want).nan_to_num(0.0).abs().max()
        assert error < 1e-12, name
    assert torch.equal(got.lse.isneginf(), lse.isneginf())


@settings(deadline=None, max_examples=40)
@given(
    masks,
    layouts(5),
    layouts(5),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_any_mask_on_any_two_layouts(
    mask: Mask, queries: Layout, keys: Layout, length: int, num_keys: int
) -> None:
    keys = dataclasses.replace(keys, cp_size=queries.cp_size)
    schedule = build_schedule(
        [(mask, None)], queries, length, keys=Side(keys, num_keys)
    )
    assert_simulates(schedule, mask, length, num_keys)


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("key_name", ["contiguous", "zigzag"])
def test_one_schedule_serves_many_pairs_of_lengths(name: str, key_name: str) -> None:
    queries, keys = Layout(name, 3), Layout(key_name, 3)
    padding = Mask(TRUE, 2) & key_padding(1)
    for mask in (Mask(), padding, padding & documents(0)):
        schedule = build_schedule([(mask, None)], queries, None, keys=Side(keys, None))
        for of_q, of_k in ((2, 5), (5, 2), (4, 4)):
            lengths = of_q * queries.num_chunks, of_k * keys.num_chunks
            assert_simulates(schedule, mask, *lengths)


@pytest.mark.parametrize("is_open", ["queries", "keys"])
def test_one_length_may_be_known(is_open: str) -> None:
    layout, mask = Layout("zigzag", 3), Mask(TRUE, 2) & key_padding(1)
    length, keys = (None, 17) if is_open == "queries" else (17, None)
    schedule = build_schedule([(mask, None)], layout, length, keys=Side(layout, keys))
    for chunk in (2, 5):
        assert_simulates(schedule, mask, length or 6 * chunk, keys or 6 * chunk)


@pytest.mark.parametrize("name", LAYOUTS)
def test_long_sequences_are_checked_by_boxes(name: str) -> None:
    mask = Mask(causal(), 2) & window(40) & key_padding(1)
    side = Side(Layout("zigzag", 3), 350)
    schedule = build_schedule([(mask, None)], Layout(name, 3), 700, keys=side)
    check_schedule(schedule)
    (part,) = schedule.parts
    dropped = dataclasses.replace(part, stages=part.stages[:1])
    with pytest.raises(PlanError, match="left out"):
        check_schedule(dataclasses.replace(schedule, parts=(dropped,)))


@pytest.mark.parametrize("mask", [Mask(causal()), Mask() & window(5, 5)])
def test_positions_of_two_open_sequences_are_not_compared(mask: Mask) -> None:
    layout = Layout("contiguous", 2)
    for length, keys in ((None, None), (8, None), (None, 8)):
        with pytest.raises(DependsOnLength):
            build_schedule([(mask, None)], layout, length, keys=Side(layout, keys))


@pytest.mark.parametrize("lengths", [(None, 8), (8, None)])
def test_a_curve_has_a_known_length(lengths: tuple[int | None, int | None]) -> None:
    for q, kv in (("hilbert", "striped"), ("striped", "hilbert")):
        with pytest.raises(DependsOnLength):
            build_schedule(
                [(Mask(), None)],
                *(Layout(q, 2), lengths[0]),
                keys=Side(Layout(kv, 2), lengths[1]),
            )


def test_keys_that_lie_as_the_queries_do_are_no_other_side() -> None:
    layout = Layout("zigzag", 2)
    own = build_schedule([(Mask(causal()), None)], layout, 24)
    side = Side(layout, 24)
    assert build_schedule([(Mask(causal()), None)], layout, 24, keys=side) == own


def test_a_rank_of_pads_has_no_tile() -> None:
    """5 keys on 4 ranks: the last one has pads only; 3 queries: so has another."""
    queries, keys = Layout("contiguous", 4), Side(Layout("contiguous", 4), 5)
    for rank in range(4):
        tile = build_tile(Mask(), queries, rank, 3, 64, keys)
        assert tile.coverage is Coverage.EMPTY
        tile = build_tile(Mask(), queries, 3, rank, 3, keys)
        assert tile.coverage is Coverage.EMPTY


def test_the_text_of_a_schedule_names_both_layouts() -> None:
    schedule = build_schedule(
        [(Mask(causal()), None)],
        *(Layout("zigzag", 2), 8),
        keys=Side(Layout("contiguous", 2), 20),
    )
    assert_expected_inline(
        str(schedule),
        """\
schedule zigzag x2, keys contiguous x2 of 20
  part 0: k <= q
    step 0: kv0/ kv1.
    step 1: kv1. kv0/""",
    )


def test_what_travels_are_keys() -> None:
    layout = Layout("contiguous", 4)
    schedule = build_schedule([(Mask(), None)], layout, 64, keys=Side(layout, 8))
    for traffic in bytes_per_rank(schedule):
        assert str(traffic.forward) == "6*B*D*G*item_bytes + 6*B*E*G*item_bytes"
    schedule = build_schedule([(Mask(), None)], layout, None, keys=Side(layout, None))
    for traffic in bytes_per_rank(schedule):
        assert traffic.forward.has(LENGTH)


def test_more_keys_cost_more() -> None:
    layout, sizes = Layout("contiguous", 4), Sizes()

    def cost(keys: int) -> float:
        schedule = build_schedule(
            [(Mask(), None)], layout, 4096, keys=Side(layout, keys)
        )
        return estimate_seconds(
            schedule, 4096, sizes=sizes, machine=CPU, kv_length=keys
        )

    assert cost(2048) < 0.6 * cost(4096)


def test_a_layout_is_chosen_for_the_attentions_between_sequences() -> None:
    other = Side(Layout("zigzag", 4), 4096)
    parts = ((Mask(causal()), None),)
    layout, _ = choose_layout(
        [], 4, 4096, crossings=[Crossing(parts, queries=None, keys=other)]
    )
    assert layout.name == "zigzag"
    full = Crossing(((Mask(), None),), queries=other, keys=None)
    assert choose_layout([], 4, 100, crossings=[full])[0].name == "contiguous"
