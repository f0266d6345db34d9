"""Dilated patterns planned for any number of ranks: uneven sizes, bytes, equal plans."""

import pytest
import torch
from support.dilated_cases import UNEVEN
from support.pattern_cases import CASES, check_simulated

from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask, causal
from ringcompile.ir.schedule import Schedule
from ringcompile.ir.text import format_schedule
from ringcompile.patterns import (
    AttentionSpec,
    ConsecutiveDilated,
    GroupedDilated,
    LongNet,
    Pattern,
)
from ringcompile.plan import selection, stages, traffic
from ringcompile.plan.backward import Phase, communications
from ringcompile.plan.traffic import (
    BATCH,
    HEAD_SIZE,
    ITEM_BYTES,
    KV_HEADS,
    VALUE_SIZE,
    bytes_per_rank,
)

H, G = 8, 4


def build(
    pattern: Pattern,
    cp_size: int,
    length: int,
    *,
    layout: str = "contiguous",
    mask: Mask | None = None,
) -> Schedule:
    parts = pattern.build_parts(mask or Mask(), AttentionSpec(H, G, length))
    return stages.build_schedule(parts, Layout(layout, cp_size), length)


def sent_rows(schedule: Schedule) -> list[int]:
    """Rows of KV that each rank sends in forward, of all KV heads together."""
    sizes = {BATCH: 1, KV_HEADS: G, HEAD_SIZE: 1, VALUE_SIZE: 1, ITEM_BYTES: 1}
    both = [t.resolve(sizes)[0] for t in bytes_per_rank(schedule)]
    assert not any(rows % 2 for rows in both), "a row of K, a row of V"
    return [rows // 2 for rows in both]


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_sizes(name: str) -> None:
    uneven = UNEVEN[name]
    layouts = [Layout("contiguous", cp_size) for cp_size in (1, 2, 3, 4)]
    for layout in (*layouts, Layout("zigzag", 3)):
        check_simulated(
            uneven.case,
            layout,
            uneven.heads,
            is_causal=uneven.is_causal,
            length=uneven.length,
        )


def shared_rows(pattern: LongNet, cp_size: int, length: int) -> list[int]:
    """Section 2A, row by row: what each rank sends to each that shares a segment."""
    T, U = length // cp_size, H // G
    total = [0] * cp_size
    for w, r in zip(pattern.segments, pattern.rates, strict=True):
        for owner in range(cp_size):
            for reader in range(cp_size):
                theirs = {p // w for p in range(reader * T, (reader + 1) * T)}
                mine = range(owner * T, (owner + 1) * T)
                for g in range(G if owner != reader else 0):
                    heads = range(g * U, (g + 1) * U)
                    offsets = {
                        h % r if pattern.offset == "paper" else h // U % r
                        for h in heads
                    }
                    total[owner] += sum(
                        p // w in theirs and p % w % r in offsets for p in mine
                    )
    return total


@pytest.mark.parametrize("offset", ["paper", "kv_head"])
def test_only_selected_rows_travel_among_ranks_that_share_a_segment(
    offset: str,
) -> None:
    for segments, rates in (((32,), (4,)), ((8, 48, 128), (1, 2, 8)), ((21,), (4,))):
        pattern = LongNet(segments, rates, offset)
        for cp_size in (2, 4, 8):
            sent = sent_rows(build(pattern, cp_size, 128))
            assert sent == shared_rows(pattern, cp_size, 128), (pattern, cp_size)


@pytest.mark.parametrize("offset", ["paper", "torchscale", "kv_head"])
def test_the_share_of_the_rows_that_travels(offset: str) -> None:
    T, rate, peers = 16, 4, 3
    for mixed in (LongNet((64,), (rate,), offset), LongNet((8, 64), (1, rate), offset)):
        sent = sent_rows(build(mixed, 8, 128))
        most = 1 if offset == "kv_head" else min(rate, H // G)
        assert max(sent) <= peers * G * T * most // rate
        assert min(sent) > 0
        if offset != "torchscale":  # whose query heads of a KV head mostly agree
            assert set(sent) == {peers * G * T * most // rate}


def test_a_segment_inside_one_shard_costs_nothing() -> None:
    for pattern in (LongNet((8, 16), (1, 4)), GroupedDilated((4, 16), (1, 2))):
        for cp_size in (2, 4, 8, 16):
            schedule = build(pattern, cp_size, 16 * cp_size)
            assert sent_rows(schedule) == [0] * cp_size
            assert not any(communications(schedule, r) for r in range(cp_size))


def test_bytes_do_not_grow_with_the_ranks_beyond_the_segment() -> None:
    T = 16
    for causal_mask in (Mask(), Mask(causal())):
        pattern = LongNet((8, 2 * T), (1, 4))
        pairs = {
            cp_size: sent_rows(build(pattern, cp_size, T * cp_size, mask=causal_mask))
            for cp_size in (2, 4, 8, 16)
        }
        for cp_size, sent in pairs.items():
            assert sent == pairs[2] * (cp_size // 2)
        assert sum(pairs[2]) > 0


def test_heads_of_other_groups_do_not_travel() -> None:
    # Of 4 KV heads the first 2 are group 0's, one row in 2; the others' is every row.
    schedule = build(GroupedDilated((32, 32), (2, 1)), 2, 32)
    assert sent_rows(schedule) == [2 * 8 + 2 * 16] * 2
    # All of a KV head's rows in backward too, and their gradients home.
    steps = [c for c in communications(schedule, 0) if c.dst >= 0]
    assert [c.phase for c in steps].count(Phase.BACKWARD_DKV) == 2


def clear_caches() -> None:
    for cached in (
        stages._build_steps,
        selection._find_segments,
        traffic._count_selected,
    ):
        cached.cache_clear()


def test_a_plan_knows_of_no_random_state() -> None:
    patterns = (
        LongNet((8, 24), (2, 3)),
        GroupedDilated((8, 24), (2, 3), divide_by_groups=True),
        ConsecutiveDilated((8, 24), (2, 3)),
    )
    for pattern in patterns:
        texts = set()
        for seed in (0, 1, 2):
            clear_caches()
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            schedule = build(pattern, 4, 43, layout="zigzag")
            bytes_per_rank(schedule)
            texts.add(format_schedule(schedule))
            assert torch.equal(torch.get_rng_state(), before)
        assert len(texts) == 1


def test_a_pattern_within_a_mask_keeps_what_it_says_of_the_output() -> None:
    for name in ("local and divided", "longnet detached"):
        schedule = build(CASES[name].pattern, 2, 43)
        text = str(schedule).splitlines()[0].partition(" | ")[2]
        assert text == ("out / 2" if "divided" in name else "detached weights")
