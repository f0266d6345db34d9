import pytest
from expecttest import assert_expected_inline

from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask, causal, window
from ringcompile.ir.schedule import Coverage, Rows, Selection, Step
from ringcompile.plan.stages import build_schedule
from ringcompile.plan.tiles import EMPTY_TILE
from ringcompile.report.schedules import read_steps


def test_a_causal_schedule_prints() -> None:
    schedule = build_schedule([(Mask(causal()), None)], Layout("contiguous", 3), None)
    assert_expected_inline(
        str(schedule),
        """\
schedule contiguous x3
  part 0: k <= q
    step 0: kv0/ kv1/ kv2/
    step 1: kv2. kv0# kv1#
    step 2: kv1. kv2. kv0#""",
    )


def test_every_causal_tile_is_visited_once() -> None:
    (part,) = build_schedule(
        [(Mask(causal()), None)], Layout("contiguous", 5), None
    ).parts
    visited = [
        (rank, (rank - step.shift) % 5)
        for step in part.steps
        for rank, tile in enumerate(step.tiles)
        if tile.coverage is not Coverage.EMPTY
    ]
    assert sorted(visited) == [(q, kv) for q in range(5) for kv in range(q + 1)]


def test_rows_are_affine_in_the_chunk_length() -> None:
    rows = Rows((1, -3), (2, 4))
    assert str(rows) == "c-3:2c+4"
    assert rows.resolve(10) == (7, 24)


def test_a_step_without_work_is_idle() -> None:
    assert Step(1, (EMPTY_TILE, EMPTY_TILE)).is_idle


def test_one_kernel_computes_each_step_of_a_causal_zigzag() -> None:
    layout = Layout("zigzag", 4)
    for mask, is_one_call in ((causal(), True), (causal() & window(5), False)):
        (part,) = build_schedule([(Mask(mask), None)], layout, 64).parts
        assert {part.is_one_call(step) for step in part.steps} == {is_one_call}


def test_gradients_of_one_kernel_travel_as_it_gives_them() -> None:
    schedule = build_schedule([(Mask(causal()), None)], Layout("zigzag", 2), 64)
    sizes = {"kv_bytes": 2, "dkv_bytes": 4, "length": 64}
    (wide,) = read_steps(schedule, **sizes)
    (narrow,) = read_steps(schedule, **sizes, one_call_bytes=2)
    assert wide.forward_bytes == narrow.forward_bytes == (32, 64)
    assert wide.backward_bytes == (32 + 128, 64 + 64)
    assert narrow.backward_bytes == (32 + 64, 64 + 32)


@pytest.mark.parametrize(
    ("offsets", "groups", "is_mixed"),
    [
        ((0, 1, 2, 3), (frozenset({0, 1}), frozenset({2, 3})), True),
        ((0, 0, None, 1), (frozenset({0}), frozenset({1})), False),
    ],
)
def test_kv_heads_join_their_query_heads(
    offsets: tuple[int | None, ...], groups: tuple[frozenset[int], ...], is_mixed: bool
) -> None:
    selection = Selection(16, 4, offsets, 2)
    assert selection.groups == groups
    assert selection.has_mixed_groups is is_mixed
