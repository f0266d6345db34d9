from expecttest import assert_expected_inline

from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask, causal, window
from ringcompile.ir.schedule import Schedule, Selection
from ringcompile.plan.stages import build_schedule
from ringcompile.plan.traffic import (
    BATCH,
    HEAD_SIZE,
    ITEM_BYTES,
    KV_HEADS,
    LENGTH,
    VALUE_SIZE,
    Traffic,
    bytes_per_rank,
)

CAUSAL = Mask(causal())
SIZES = {BATCH: 2, KV_HEADS: 2, HEAD_SIZE: 8, VALUE_SIZE: 4, ITEM_BYTES: 2, LENGTH: 64}
ROW = 2 * 2 * (8 + 4)  # elements of K and V in one row


def schedule_of(mask: Mask, name: str, cp_size: int, length: int | None) -> Schedule:
    return build_schedule([(mask, None)], Layout(name, cp_size), length)


def forward_rows(traffic: Traffic) -> float:
    return traffic.resolve(SIZES)[0] / (ROW * 2)


def test_bytes_are_formulas_in_the_sizes() -> None:
    traffic = bytes_per_rank(schedule_of(CAUSAL, "contiguous", 2, None))
    lines = [f"rank {r}: {t.forward} | {t.backward}" for r, t in enumerate(traffic)]
    assert_expected_inline(
        "\n".join(lines),
        """\
rank 0: B*D*G*S*item_bytes/2 + B*E*G*S*item_bytes/2 | B*D*G*S*item_bytes/2 + B*E*G*S*item_bytes/2
rank 1: 0 | 2*B*D*G*S + 2*B*E*G*S""",
    )


def test_a_formula_holds_for_each_length_it_serves() -> None:
    for name in ("contiguous", "zigzag"):
        for any_length, fixed in zip(
            bytes_per_rank(schedule_of(CAUSAL, name, 4, None)),
            bytes_per_rank(schedule_of(CAUSAL, name, 4, 64)),
            strict=True,
        ):
            assert any_length.resolve(SIZES) == fixed.resolve(SIZES)


def test_bidirectional_attention_sends_every_row_to_every_other_rank() -> None:
    for traffic in bytes_per_rank(schedule_of(Mask(), "zigzag", 4, 64)):
        forward, backward = traffic.resolve(SIZES)
        assert forward == 3 * 16 * ROW * 2
        assert backward == forward + 3 * 16 * ROW * 4


def test_a_window_sends_its_halo() -> None:
    traffic = bytes_per_rank(schedule_of(CAUSAL & window(5), "contiguous", 4, 64))
    assert [forward_rows(t) for t in traffic] == [5, 5, 5, 0]


def test_a_selection_sends_its_share_of_the_rows_that_are_shared() -> None:
    selection = Selection(32, 4, (0, 1, 2, 3), 4)
    schedule = build_schedule([(Mask(), selection)], Layout("contiguous", 4), 64)
    assert [forward_rows(t) for t in bytes_per_rank(schedule)] == [4, 4, 4, 4]
    # Heads 0 and 1 share a KV head, and it brings the rows of both.
    mixed = Selection(32, 4, (0, 1, 2, 3), 2)
    schedule = build_schedule([(Mask(), mixed)], Layout("contiguous", 4), 64)
    assert [forward_rows(t) for t in bytes_per_rank(schedule)] == [8, 8, 8, 8]
