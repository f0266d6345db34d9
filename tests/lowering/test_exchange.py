"""Ulysses on gloo ranks, alone and around a ring, against the dense reference."""

from dataclasses import replace

import pytest
import torch
from support.ranks import RankPool
from support.ring_cases import Case, check_cases, join, run_cases, run_inference
from torch.distributed import ProcessGroup

from ringcompile import ops
from ringcompile.ir.layout import Layout
from ringcompile.ir.schedule import Ulysses
from ringcompile.lowering.hops import Exchange, Phase, Tag
from ringcompile.plan.stages import build_schedule
from ringcompile.plan.traffic import (
    BATCH,
    HEAD_SIZE,
    HEADS,
    ITEM_BYTES,
    KV_HEADS,
    LENGTH,
    VALUE_SIZE,
    bytes_per_rank,
)

SIZES = ((2, 2), (3, 3), (4, 2), (4, 4))  # ranks, and of those that deal out heads


def make_case(mask: str, layout: str, size: int) -> Case:
    heads = (2 * size, size, 8, 8)
    return Case(mask, layout, heads=heads, ulysses=size)


@pytest.mark.parametrize(("world_size", "size"), SIZES)
def test_every_mask_on_layouts_of_runs(
    ranks: RankPool, world_size: int, size: int
) -> None:
    masks = ("all", "causal", "window", "two-sided window", "documents", "padding")
    check_cases(
        ranks,
        world_size,
        [
            make_case(mask, layout, size)
            for mask in masks
            for layout in ("contiguous", "zigzag")
        ],
    )


@pytest.mark.parametrize(("world_size", "size"), SIZES)
def test_heads_and_dtypes(ranks: RankPool, world_size: int, size: int) -> None:
    case = make_case("causal", "zigzag", size)
    wide = (4 * size, size, 16, 8)
    check_cases(
        ranks,
        world_size,
        [
            replace(case, heads=wide),
            replace(case, heads=wide, dtype=torch.bfloat16),
            replace(case, dtype=torch.float64, kernel="math"),
            replace(case, any_length=True),
            replace(case, needs_grad=(True, False, True)),
        ],
    )


def test_written_out_in_graphs(ranks: RankPool) -> None:
    case = replace(make_case("causal", "zigzag", 2), compile="expanded")
    some = replace(case, needs_grad=(False, True, False))
    check_cases(ranks, 4, [case, replace(case, any_length=True), some])


@pytest.mark.slow
def test_inductor_lowers_it(ranks: RankPool) -> None:
    case = make_case("causal", "zigzag", 2)
    check_cases(ranks, 2, [replace(case, compile="inductor", dtype=torch.bfloat16)])


def test_without_gradients(ranks: RankPool) -> None:
    case = replace(make_case("causal", "zigzag", 2), needs_grad=(False, False, False))
    got = join(case, ranks.run(run_inference, case, world_size=4))
    assert (got.double() - case.expected()[0]).abs().max() < 1e-5


def trace_tags(group: ProcessGroup, rank: int, case: Case) -> list[tuple[int, int]]:
    """The tag of each hop, and how many bytes it sends."""
    seen: list[tuple[int, int]] = []
    hop = ops.HOP

    def noting(payload: list[torch.Tensor], *rest: object) -> list[torch.Tensor]:
        assert isinstance(rest[4], int)
        is_sent = rest[1] != -1
        seen.append((rest[4], is_sent * sum(x.nbytes for x in payload)))
        return hop(payload, *rest)  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "HOP", noting)
        run_cases(group, rank, (case,))
    return seen


def test_all_ranks_start_the_same_hops_and_send_rows_of_others_heads(
    ranks: RankPool,
) -> None:
    case = replace(make_case("causal", "zigzag", 2), dtype=torch.float64)
    first, *others = ranks.run(trace_tags, case, world_size=4)
    tags = [tag for tag, _ in first]
    assert all([tag for tag, _ in other] == tags for other in others)
    assert len(set(tags)) == len(tags)
    sent = {Exchange(t.step // 2): n for t, n in _decode(first) if _is_exchange(t)}
    H, G, D, E = case.heads
    row_bytes = 2 * case.length // 4 // 2 * 8  # of a head, the half for the other rank
    assert sent == {
        Exchange.QKV: (H * D + G * (D + E)) * row_bytes,
        Exchange.OUT: H * E * row_bytes,
        Exchange.GRAD_OUT: H * E * row_bytes,
        Exchange.GRADS: (H * D + G * (D + E)) * row_bytes,
    }


def test_bytes_are_those_that_the_plan_tells(ranks: RankPool) -> None:
    case = replace(make_case("causal", "zigzag", 2), dtype=torch.float32)
    layout = Layout("zigzag", 4).merge(2)
    schedule = build_schedule(case.parts, layout, case.length)
    schedule = replace(schedule, ulysses=Ulysses(2, 2))
    H, G, D, E = case.heads
    sizes = {BATCH: 2, HEADS: H, KV_HEADS: G, HEAD_SIZE: D, VALUE_SIZE: E}
    sizes |= {ITEM_BYTES: 4, LENGTH: case.length}
    told = [sum(t.resolve(sizes)) for t in bytes_per_rank(schedule)]
    seen = ranks.run(trace_tags, case, world_size=4)
    assert [sum(n for _, n in of_rank) for of_rank in seen] == told


def _decode(seen: list[tuple[int, int]]) -> list[tuple[Tag, int]]:
    return [(Tag.decode(tag), num_bytes) for tag, num_bytes in seen]


def _is_exchange(tag: Tag) -> bool:
    return tag.phase is Phase.EXCHANGE
