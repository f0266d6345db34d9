from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import layouts, masks

from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask, causal, window
from ringcompile.ir.schedule import format_runs
from ringcompile.patterns import AttentionSpec, LongNet
from ringcompile.plan.backward import Communication, communications
from ringcompile.plan.stages import build_schedule

CAUSAL = Mask(causal())


def format_hop(hop: Communication) -> str:
    return (
        f"{hop.phase.value} {hop.step}: to {hop.dst} {format_runs(hop.sent)}"
        f" | from {hop.src} {format_runs(hop.received)}"
    )


@settings(deadline=None, max_examples=40)
@given(masks, layouts(8), st.integers(1, 40), st.sampled_from([None, 1, 2, 3]))
def test_all_ranks_start_the_same_list(
    mask: Mask, layout: Layout, length: int, stages: int | None
) -> None:
    schedule = build_schedule([(mask, None)], layout, length, num_stages=stages)
    lists = [
        [(hop.phase, hop.part, hop.step) for hop in communications(schedule, rank)]
        for rank in range(layout.cp_size)
    ]
    assert all(other == lists[0] for other in lists)
    assert len(lists[0]) == 3 * (len(schedule.parts[0].steps) - 1)


def test_a_window_fetches_its_halo_and_sends_gradients_home() -> None:
    schedule = build_schedule([(CAUSAL & window(3), None)], Layout("contiguous", 3), 24)
    hops = "\n".join(map(format_hop, communications(schedule, 1)))
    assert_expected_inline(
        hops,
        """\
forward KV 1: to 2 5:c | from 0 5:c
backward KV 1: to 2 5:c | from 0 5:c
backward dKV 1: to 0 5:c | from 2 5:c""",
    )


def test_kv_of_a_stage_flies_during_the_one_before() -> None:
    schedule = build_schedule([(CAUSAL, None)], Layout("zigzag", 5), None, num_stages=3)
    order = [f"{hop.phase.value} {hop.step}" for hop in communications(schedule, 0)]
    assert_expected_inline(
        "\n".join(order),
        """\
forward KV 1
forward KV 2
forward KV 3
forward KV 4
backward KV 1
backward KV 2
backward KV 3
backward KV 4
backward dKV 1
backward dKV 2
backward dKV 3
backward dKV 4""",
    )


def test_steps_are_numbered_over_all_parts() -> None:
    parts = LongNet((32, 64), (2, 4)).build_parts(CAUSAL, AttentionSpec(4, 4, 64))
    schedule = build_schedule(parts, Layout("contiguous", 4), 64)
    steps = {(hop.part, hop.step) for hop in communications(schedule, 2)}
    assert steps == {(0, 1), (1, 3), (1, 4), (1, 5)}


def test_one_rank_has_nothing_to_say() -> None:
    assert (
        communications(build_schedule([(CAUSAL, None)], Layout("zigzag", 1), None), 0)
        == ()
    )
