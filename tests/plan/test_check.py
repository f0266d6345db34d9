from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import layouts, masks

from ringcompile.errors import PlanError
from ringcompile.ir.layout import LAYOUTS, Layout
from ringcompile.ir.mask import Mask, causal, documents, window
from ringcompile.ir.schedule import Coverage, Kernel, Piece, Rows, Schedule, Step, Tile
from ringcompile.patterns import AttentionSpec, LocalWindow, LongNet
from ringcompile.plan.backward import Communication, Phase, communications
from ringcompile.plan.check import check_communications, check_schedule
from ringcompile.plan.stages import build_schedule
from ringcompile.plan.tiles import EMPTY_TILE

CAUSAL = Mask(causal())
WHOLE = Rows((0, 0), (1, 0))


@settings(deadline=None, max_examples=40)
@given(masks, layouts(16), st.integers(1, 40))
def test_what_is_built_passes(mask: Mask, layout: Layout, length: int) -> None:
    check_schedule(build_schedule([(mask, None)], layout, length))


@settings(deadline=None, max_examples=15)
@given(masks, layouts(4), st.integers(321, 2_000))
def test_long_sequences_are_checked_by_boxes(
    mask: Mask, layout: Layout, length: int
) -> None:
    check_schedule(build_schedule([(mask, None)], layout, length))


@pytest.mark.parametrize("name", LAYOUTS)
def test_patterns_and_schedules_for_any_length_pass(name: str) -> None:
    layout = Layout(name, 4)
    for parts in (
        LongNet((16, 64, 150), (1, 4, 3)).build_parts(CAUSAL, AttentionSpec(4, 2, 64)),
        LocalWindow(32, 8).build_parts(CAUSAL, AttentionSpec(4, 2, 64)),
    ):
        check_schedule(build_schedule(parts, layout, 203))
    length = None if layout.has_runs else 203
    for mask in (CAUSAL, Mask(), Mask(causal(), 1) & documents(0)):
        check_schedule(build_schedule([(mask, None)], layout, length))


def contiguous(length: int | None, mask: Mask = CAUSAL) -> Schedule:
    return build_schedule([(mask, None)], Layout("contiguous", 3), length)


def with_tile(schedule: Schedule, step: int, rank: int, tile: Tile) -> Schedule:
    """The schedule with one tile replaced."""
    (part,) = schedule.parts
    steps = list(part.steps)
    tiles = list(steps[step].tiles)
    tiles[rank] = tile
    steps[step] = Step(steps[step].shift, tuple(tiles))
    return with_steps(schedule, steps)


def with_steps(schedule: Schedule, steps: list[Step]) -> Schedule:
    part = replace(schedule.parts[0], stages=tuple((step,) for step in steps))
    return replace(schedule, parts=(part,))


def tile_of(*pieces: Piece, needs: Rows = WHOLE) -> Tile:
    return Tile(Coverage.PARTIAL, pieces, (needs,))


FULL = Piece(WHOLE, WHOLE, Kernel.FULL)
HALF = Rows((0, 0), (0, 4))


@pytest.mark.parametrize("length", [24, 3_000, None])
@pytest.mark.parametrize(
    ("step", "rank", "tile", "fault"),
    [
        (1, 1, EMPTY_TILE, "left out"),
        (1, 1, tile_of(Piece(HALF, WHOLE, Kernel.FULL)), "left out"),
        (1, 1, tile_of(FULL, FULL), "more than once"),
        (1, 0, tile_of(FULL), "computed though masked"),
        (0, 0, tile_of(FULL), "computed though masked"),
        (1, 1, tile_of(Piece(WHOLE, WHOLE, Kernel.CAUSAL)), "left out|unlike a causal"),
        (1, 1, tile_of(FULL, needs=Rows((0, 1), (1, 0))), "do not lie within"),
        (1, 1, tile_of(Piece(WHOLE, Rows((0, 0), (2, 0)), Kernel.FULL)), "within"),
        (0, 0, tile_of(Piece(WHOLE, Rows((0, 1), (1, 0)), Kernel.CAUSAL)), "no square"),
        (1, 1, Tile(Coverage.FULL), "0 pieces in a tile of coverage FULL"),
    ],
)
def test_wrong_tiles_are_refused(
    length: int | None, step: int, rank: int, tile: Tile, fault: str
) -> None:
    if length is None and tile.pieces and tile.pieces[0].q == HALF:
        pytest.skip("four rows are no half of every chunk")
    with pytest.raises(PlanError, match=fault):
        check_schedule(with_tile(contiguous(length), step, rank, tile))


@pytest.mark.parametrize("length", [23, 2_999])
def test_padding_is_refused(length: int) -> None:
    schedule = contiguous(length, Mask())
    with pytest.raises(PlanError, match="padding"):
        check_schedule(with_tile(schedule, 1, 2, tile_of(FULL)))


def test_a_masked_tile_of_selected_rows_must_not_be_dropped() -> None:
    parts = LongNet((32,), (4,)).build_parts(CAUSAL, AttentionSpec(4, 2, 64))
    schedule = build_schedule(parts, Layout("contiguous", 4), 64)
    check_schedule(schedule)
    with pytest.raises(PlanError, match="leaves out selected keys"):
        check_schedule(with_tile(schedule, 1, 1, EMPTY_TILE))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda steps: steps[:2], "left out"),
        (lambda steps: steps[1:], "0 comes first"),
        (lambda steps: [*steps, steps[1]], "each once"),
        (lambda steps: [*steps, Step(7, steps[1].tiles)], "each once"),
        (lambda steps: [steps[0], Step(1, steps[1].tiles[:2])], "2 tiles in the step"),
    ],
)
def test_wrong_steps_are_refused(
    change: Callable[[list[Step]], list[Step]], fault: str
) -> None:
    schedule = contiguous(None)
    steps = change(list(schedule.parts[0].steps))
    with pytest.raises(PlanError, match=fault):
        check_schedule(with_steps(schedule, steps))


def hops() -> list[list[Communication]]:
    schedule = build_schedule([(Mask(), None)], Layout("contiguous", 3), None)
    return [list(communications(schedule, rank)) for rank in range(3)]


def test_a_hop_without_a_partner_is_refused() -> None:
    lists = hops()
    del lists[1][0]
    with pytest.raises(PlanError, match="rank 1 has none for it"):
        check_communications(lists)


def test_a_hop_to_nobody_has_no_rows() -> None:
    lists = hops()
    lists[0][0] = replace(lists[0][0], dst=-1)
    with pytest.raises(PlanError, match="with peer -1"):
        check_communications(lists)


def test_unequal_row_counts_are_refused() -> None:
    lists = hops()
    lists[2][0] = replace(lists[2][0], received=(Rows((0, 1), (1, 0)),))
    with pytest.raises(PlanError, match="rows 0:c, while rank 2 has 1:c"):
        check_communications(lists)


def test_ranks_that_wait_for_each_other_are_refused() -> None:
    lists = hops()
    lists[1][0], lists[1][1] = lists[1][1], lists[1][0]
    with pytest.raises(PlanError, match="wait for each other") as error:
        check_communications(lists)
    assert "rank 1, forward KV, step 2" in str(error.value)


def test_another_order_is_refused_where_nobody_waits() -> None:
    nothing = [
        Communication(Phase.FORWARD_KV, 0, step, -1, -1, (), ()) for step in (1, 2)
    ]
    with pytest.raises(
        PlanError, match="ranks 0 and 1 differ at their communication 0"
    ):
        check_communications([nothing, nothing[::-1]])


def test_the_windows_of_a_long_sequence_pass() -> None:
    check_schedule(contiguous(100_000, CAUSAL & window(4_095)))
