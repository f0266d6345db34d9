"""What compilers do to a ring unless cured (FACTS.md section 2.3), cured and not."""

import pytest
from support.ranks import RankPool
from support.ring_cases import Case, join
from support.ring_trace import (
    Trace,
    expected,
    trace,
    trace_checkpointed,
)
from support.tolerances import assert_gradients_equal, assert_output_equal

# Values of other size than keys take the kernel that the trace can watch.
CASE = Case("causal", heads=(4, 2, 8, 16))


def is_overlapped(trace: Trace, hop: str) -> bool:
    """Whether something is computed between a hop's start and its wait."""
    events = trace.events
    start, wait = events.index(f"start {hop}"), events.index(f"wait {hop}")
    return "compute" in events[start:wait]


def check_results(traces: list[Trace], case: Case = CASE) -> None:
    by_tensor = zip(*(t.results for t in traces), strict=True)
    out, *grads = (join(case, shards) for shards in by_tensor)
    want_out, *want_grads = expected(case)
    assert_output_equal(out, want_out)
    names = ("dq", "dk", "dv")
    assert_gradients_equal(
        dict(zip(names, grads, strict=True)), dict(zip(names, want_grads, strict=True))
    )


FORWARD = ["attention 3, forward KV, step 1", "attention 3, forward KV, step 2"]
BACKWARD = [
    "attention 3, backward KV, step 1",
    "attention 3, backward KV, step 2",
    "attention 3, backward dKV, step 1",
    "attention 3, backward dKV, step 2",
]


@pytest.fixture(scope="module")
def cured(ranks: RankPool) -> list[Trace]:
    return ranks.run(trace, CASE, world_size=3)


def test_all_ranks_emit_the_same_tags(cured: list[Trace]) -> None:
    assert [t.tags for t in cured] == [[FORWARD, BACKWARD]] * 3
    check_results(cured)


def test_received_kv_are_not_saved(cured: list[Trace]) -> None:
    B, H, G, T, D, E = 2, 4, 2, CASE.length // 3, 8, 16
    rows = B * T * 4
    saved = rows * (2 * (H * D + G * (D + E)) + H * E + H)  # inputs, sines, out, lse
    saved += sum(x.nbytes for x in CASE.captures)  # the ring op's, whole
    assert all(saved <= t.saved_bytes <= 1.01 * saved for t in cured)


def test_hops_fly_while_tiles_are_computed(ranks: RankPool, cured: list[Trace]) -> None:
    # The first fetch of backward would fly under what comes before the ring.
    for hop in (*FORWARD, *BACKWARD[1:]):
        assert is_overlapped(cured[2], hop), hop
    reordered = ranks.run(trace, CASE, ("order",), world_size=3)  # as a user may ask
    assert is_overlapped(reordered[2], BACKWARD[3])
    uncured = ranks.run(trace, CASE, ("order", "places"), world_size=3)
    assert not is_overlapped(uncured[2], BACKWARD[3])


def test_checkpointing_replays_no_hop(ranks: RankPool) -> None:
    traces = ranks.run(trace_checkpointed, CASE, world_size=3)
    assert [t.tags for t in traces] == [[FORWARD, BACKWARD]] * 3
    check_results(traces)


@pytest.mark.slow
def test_checkpointing_replays_hops_unless_results_are_kept(ranks: RankPool) -> None:
    traces = ranks.run(trace_checkpointed, CASE, ("keep",), world_size=3)
    fetched, *others = traces[2].tags[1]
    assert fetched == BACKWARD[0]
    assert others[:2] == FORWARD


@pytest.mark.slow
def test_each_parts_own_output_is_kept_where_weights_are_detached(
    ranks: RankPool,
) -> None:
    case = Case("detached longnet", heads=(4, 2, 8, 16))
    traces = ranks.run(trace_checkpointed, case, world_size=2)
    # Segments of 24 lie in one rank's shard.
    forward = ["attention 3, forward KV, step 2"]
    backward = ["attention 3, backward KV, step 2", "attention 3, backward dKV, step 2"]
    assert [t.tags for t in traces] == [[forward, backward]] * 2
    check_results(traces, case)
