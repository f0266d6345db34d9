import time

import pytest
from expecttest import assert_expected_inline

from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import FALSE, Mask, causal, documents, window
from ringcompile.ir.schedule import Coverage, Schedule, Selection
from ringcompile.plan.coverage import DependsOnLength
from ringcompile.plan.stages import build_schedule

CAUSAL = Mask(causal())


def shifts(schedule: Schedule) -> list[list[int]]:
    return [[step.shift for step in stage] for stage in schedule.parts[0].stages]


def test_idle_steps_are_dropped() -> None:
    schedule = build_schedule([(CAUSAL & window(3), None)], Layout("contiguous", 8), 64)
    assert shifts(schedule) == [[0], [1]]


def test_a_window_over_zigzag_reaches_both_neighbours() -> None:
    schedule = build_schedule([(CAUSAL & window(3), None)], Layout("zigzag", 4), 64)
    assert_expected_inline(
        str(schedule),
        """\
schedule zigzag x4
  part 0: k <= q and q <= k + 3
    step 0: kv0/ kv1/ kv2/ kv3/
    step 1: kv3. kv0/ kv1/ kv2/
    step 2: kv1/ kv2/ kv3/ kv0.""",
    )


def test_the_own_step_is_kept_without_work() -> None:
    schedule = build_schedule([(Mask(FALSE), None)], Layout("contiguous", 3), 9)
    assert shifts(schedule) == [[0]]


@pytest.mark.parametrize(
    ("num_stages", "expected"),
    [
        (None, [[0], [1], [2], [3], [4]]),
        (1, [[0, 1, 2, 3, 4]]),
        (2, [[0], [1, 2, 3, 4]]),
        (3, [[0], [1, 2], [3, 4]]),
        (4, [[0], [1, 2], [3], [4]]),
        (99, [[0], [1], [2], [3], [4]]),
    ],
)
def test_steps_are_grouped_behind_the_own_one(
    num_stages: int | None, expected: list[list[int]]
) -> None:
    layout = Layout("zigzag", 5)
    schedule = build_schedule([(CAUSAL, None)], layout, None, num_stages=num_stages)
    assert shifts(schedule) == expected


def test_a_segment_inside_a_shard_needs_no_other() -> None:
    selection = Selection(16, 4, (0, 1, 2, 3), 2)
    schedule = build_schedule([(CAUSAL, selection)], Layout("contiguous", 4), 64)
    assert shifts(schedule) == [[0]]


def test_a_segment_over_two_shards_links_them() -> None:
    selection = Selection(32, 4, (0, 1, 2, 3), 2)
    schedule = build_schedule([(CAUSAL, selection)], Layout("contiguous", 4), 64)
    assert_expected_inline(
        str(schedule),
        """\
schedule contiguous x4
  part 0: k <= q
    step 0: kv0/ kv1/ kv2/ kv3/
    step 1: kv3. kv0/ kv1. kv2/""",
    )


def test_residues_that_lie_on_one_rank_stay_there() -> None:
    selection = Selection(32, 4, (0, 1, 2, 3), 4)
    schedule = build_schedule([(Mask(), selection)], Layout("striped", 4), 64)
    assert shifts(schedule) == [[0]]
    mixed = Selection(32, 3, (0, 1, 2), 3)
    schedule = build_schedule([(Mask(), mixed)], Layout("striped", 4), 64)
    assert shifts(schedule) == [[0], [1], [2], [3]]


def test_a_shard_of_padding_selects_nothing() -> None:
    selection = Selection(4, 2, (0, 1), 1)
    (part,) = build_schedule([(Mask(), selection)], Layout("contiguous", 4), 5).parts
    assert part.steps[0].tiles[3].coverage is Coverage.EMPTY


def test_a_selection_needs_a_length() -> None:
    with pytest.raises(DependsOnLength, match="segment 4, rate 2"):
        build_schedule([(Mask(), Selection(4, 2, (0,), 1))], Layout("zigzag", 2), None)


def test_planning_is_quick() -> None:
    for mask, layout, length, allowed_s in [
        (CAUSAL, Layout("zigzag", 16), None, 1.0),
        (Mask(causal(), 1) & documents(0), Layout("zigzag", 16), 1_000_003, 2.0),
        (CAUSAL & window(4_095), Layout("contiguous", 16), 1 << 20, 2.0),
    ]:
        start = time.process_time()
        build_schedule([(mask, None)], layout, length)
        assert time.process_time() - start < allowed_s
