import time
from dataclasses import replace

import pytest

from ringcompile.ir.layout import LAYOUTS, Layout, Side
from ringcompile.ir.mask import Mask, causal, chunked, documents, window
from ringcompile.patterns import (
    AttentionSpec,
    BigBird,
    DilatedWindow,
    LocalWindow,
    LongNet,
)
from ringcompile.plan.backward import communications
from ringcompile.plan.choose import choose_layout
from ringcompile.plan.cost import CPU, H200, Machine, Sizes, estimate_seconds
from ringcompile.plan.pairs import count_pairs
from ringcompile.plan.stages import build_schedule

CAUSAL = Mask(causal())


@pytest.mark.parametrize("machine", [CPU, H200], ids=["cpu", "h200"])
@pytest.mark.parametrize(
    ("mask", "cp_size", "length", "expected"),
    [
        (CAUSAL, 4, 32_768, "zigzag"),
        (CAUSAL, 16, 1 << 20, "zigzag"),
        (Mask(causal(), 1) & documents(0), 4, 8_192, "zigzag"),
        (Mask(), 4, 1_024, "contiguous"),
        (Mask(), 16, 1 << 17, "contiguous"),
        (CAUSAL & window(4_095), 8, 1 << 18, "contiguous"),
        (CAUSAL, 1, 4_096, "contiguous"),
    ],
)
def test_the_mask_decides(
    machine: Machine, mask: Mask, cp_size: int, length: int, expected: str
) -> None:
    layout, reason = choose_layout([[(mask, None)]], cp_size, length, machine=machine)
    assert layout == Layout(expected, cp_size)
    assert reason


def test_short_causal_sequences_on_a_cpu_are_balanced() -> None:
    assert choose_layout([[(CAUSAL, None)]], 4, 512)[0].name == "zigzag"


def test_of_several_masks_the_costlier_decides() -> None:
    attentions = [[(CAUSAL, None)], [(CAUSAL & window(1_023), None)]]
    assert choose_layout(attentions, 8, 32_768)[0].name == "zigzag"


def test_patterns_decide_as_masks_do() -> None:
    spec = AttentionSpec(32, 8, 32_768, is_causal=True)
    sparse = LocalWindow(1_024).build_parts(CAUSAL, spec)
    assert choose_layout([sparse], 4, 32_768)[0].name == "contiguous"
    assert choose_layout([sparse, [(CAUSAL, None)]], 4, 32_768)[0].name == "zigzag"


@pytest.mark.parametrize("machine", [CPU, H200], ids=["cpu", "h200"])
@pytest.mark.parametrize(
    ("cp_size", "rate", "expected"),
    [
        (4, 4, "striped"),  # a rank has one residue, and needs no other rank's rows
        (8, 4, "striped"),
        (3, 3, "striped"),
        (2, 4, "striped"),
        (4, 3, "contiguous"),
        (4, 1, "contiguous"),
    ],
)
def test_residues_of_a_dilated_window_lie_apart(
    cp_size: int, rate: int, expected: str, machine: Machine
) -> None:
    spec = AttentionSpec(32, 8, 131_072, is_causal=True)
    dilated = DilatedWindow(1_024, rate).build_parts(CAUSAL, spec)
    chosen, reason = choose_layout([dilated], cp_size, 131_072, machine=machine)
    assert chosen == Layout(expected, cp_size)
    assert ("striped" in reason) is (expected == "striped")
    if expected == "striped":
        schedule = build_schedule(dilated, chosen, 131_072)
        hops = [
            hop for rank in range(cp_size) for hop in communications(schedule, rank)
        ]
        assert bool(hops) is (cp_size > rate)


def test_blocks_are_not_striped() -> None:
    """The model counts pairs: the blocks that hold them are more in striped shards."""
    spec = AttentionSpec(32, 8, 16_384, is_causal=True)
    blocks = BigBird(9, 2, 1, 128).build_parts(CAUSAL, spec)
    layout = choose_layout([blocks], 8, 16_384, machine=H200)[0]
    assert layout.name == "zigzag"
    assert seconds(blocks[0][0], "striped") < seconds(blocks[0][0], "zigzag")


def test_layers_that_are_alike_cost_no_more_time() -> None:
    dilated = LongNet((1_024,), (2,)).build_parts(CAUSAL, AttentionSpec(4, 4, 8_192))
    choose_layout([dilated], 4, 8_192)
    start = time.process_time()
    assert choose_layout([dilated] * 200, 4, 8_192) == choose_layout(
        [dilated], 4, 8_192
    )
    assert time.process_time() - start < 3.0


def test_the_reason_compares() -> None:
    _, reason = choose_layout([[(CAUSAL, None)]], 4, 32_768, machine=H200)
    assert reason.startswith("zigzag costs least by the model (contiguous 1.")


def seconds(
    mask: Mask, name: str, length: int = 16_384, *, num_stages: int | None = None
) -> float:
    layout = Layout(name, 4)
    schedule = build_schedule([(mask, None)], layout, length, num_stages=num_stages)
    return estimate_seconds(schedule, length, sizes=Sizes(), machine=H200)


def test_costs_order_as_the_work_does() -> None:
    assert seconds(CAUSAL & window(511), "contiguous") < seconds(CAUSAL, "contiguous")
    assert seconds(CAUSAL, "zigzag") < seconds(CAUSAL, "contiguous")
    assert seconds(CAUSAL, "zigzag") < seconds(CAUSAL, "zigzag", 32_768)
    slow = replace(H200, link_bytes=1e9)
    schedule = build_schedule([(CAUSAL, None)], Layout("zigzag", 4), 16_384)
    assert estimate_seconds(
        schedule, 16_384, sizes=Sizes(), machine=slow
    ) > 2 * seconds(CAUSAL, "zigzag")


def test_hops_that_nothing_hides_cost() -> None:
    assert seconds(CAUSAL, "zigzag", num_stages=1) > seconds(CAUSAL, "zigzag")


def test_a_selection_costs_its_share() -> None:
    parts = LongNet((4_096,), (4,)).build_parts(CAUSAL, AttentionSpec(4, 4, 64))
    schedule = build_schedule(parts, Layout("contiguous", 2), 8_192)
    dilated = estimate_seconds(schedule, 8_192, sizes=Sizes(), machine=CPU)
    whole = build_schedule([(parts[0][0], None)], Layout("contiguous", 2), 8_192)
    dense = estimate_seconds(whole, 8_192, sizes=Sizes(), machine=CPU)
    assert dilated < dense / 3  # 1/16 of the pairs, by the slower kernel


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "hilbert"])
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (CAUSAL, 4_096 * 4_097 // 2),
        (Mask(), 4_096**2),
        (CAUSAL & window(255), 4_096 * 256 - 256 * 255 // 2),
        (CAUSAL & chunked(512), 4_096 * 513 // 2),
        (Mask(causal(), 1) & documents(0), 4_096 * 4_097 // 2),
    ],
)
def test_pairs_are_counted_roughly(name: str, mask: Mask, expected: int) -> None:
    assert sum(count_by_rank(name, mask)) == pytest.approx(expected, rel=0.2)


def count_by_rank(name: str, mask: Mask) -> list[float]:
    """Pairs that each of four ranks computes, of 4,096 tokens."""
    layout, counted = Layout(name, 4), [0.0] * 4
    side = Side(layout, 4_096)
    (part,) = build_schedule([(mask, None)], layout, 4_096).parts
    for step in part.steps:
        for rank, tile in enumerate(step.tiles):
            ranks = (rank, (rank - step.shift) % 4)
            for piece in tile.pieces:
                counted[rank] += count_pairs(part, piece, side, side, ranks=ranks)
    return counted


def test_a_curve_burdens_the_ranks_with_late_tokens() -> None:
    """One and a half times the mean: each quarter of the square is early or late."""
    counted = count_by_rank("hilbert", CAUSAL)
    assert sum(counted) == pytest.approx(4_096 * 4_097 / 2, rel=0.05)
    assert [n / (sum(counted) / 4) for n in counted] == pytest.approx(
        [0.5, 1.5, 1.5, 0.5], rel=0.05
    )


def test_a_curve_is_never_chosen() -> None:
    for mask in (CAUSAL, Mask(), CAUSAL & window(63), CAUSAL & chunked(256)):
        for cp_size in (1, 2, 4):
            assert choose_layout([[(mask, None)]], cp_size, 1_024)[0].name != "hilbert"


@pytest.mark.parametrize("rate", [1, 4])
def test_choosing_is_quick(rate: int) -> None:
    spec = AttentionSpec(32, 8, 1 << 20, is_causal=True)
    parts = DilatedWindow(4_096, rate).build_parts(CAUSAL, spec)
    start = time.process_time()
    choose_layout([parts], 16, 1 << 20, machine=H200)
    assert time.process_time() - start < 10.0  # some take a minute if asked finely
