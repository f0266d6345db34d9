"""What block-sparse attention sends: the blocks that somebody needs, and little more."""

import pytest
import torch

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask, causal
from ringcompile.ir.text import format_schedule
from ringcompile.patterns import (
    AttentionSpec,
    BigBird,
    Custom,
    DilatedBlocks,
    DilatedWindow,
    Fixed,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    Longformer,
    MaskPattern,
    PerHead,
    Sinks,
    Strided,
    Variable,
)
from ringcompile.plan.stages import build_schedule
from ringcompile.plan.traffic import (
    BATCH,
    HEAD_SIZE,
    ITEM_BYTES,
    KV_HEADS,
    VALUE_SIZE,
    bytes_per_rank,
)

S, BLOCK, H, G = 1024, 64, 4, 2
ONE_BYTE_ROWS = {BATCH: 1, KV_HEADS: 1, HEAD_SIZE: 1, VALUE_SIZE: 0, ITEM_BYTES: 1}
PATTERNS: dict[str, MaskPattern] = {
    "local window": LocalWindow(256),
    "dilated blocks": DilatedBlocks((2, 7)),
    "global local": GlobalLocal(2, 256),
    "fixed": Fixed(4, 1, 2),
    "variable": Variable((2, 5), ((3, 4),), random_blocks=1),
    "bigbird": BigBird(3, 1, 2),
    "longformer": Longformer(3, (0, 17)),
    "hierarchical": Hierarchical(((2, 1), (8, 4), (32, 16))),
    "table": Custom(torch.arange(256).view(16, 16) * 13 % 11 < 2),
    "by head": PerHead((LocalWindow(128), DilatedBlocks((9,)))),
    "sinks": Sinks(70, 300),
    "dilated window": DilatedWindow(100, 3),
    "strided": Strided(128),
}


def count_needed_rows(mask: Mask, layout: Layout) -> list[int]:
    """Rows of the blocks of each rank that others need: every query is asked."""
    order = [torch.tensor(layout.positions(r, S)) for r in range(layout.cp_size)]
    h = torch.arange(H).view(-1, 1, 1)
    needed = [0] * layout.cp_size
    for reader, q in enumerate(order):
        for owner, k in enumerate(order):
            if reader != owner:
                at = (torch.zeros(1, dtype=torch.int64), h, q[:, None], k)
                kept = evaluate(mask.keeps, at).expand(H, len(q), len(k))
                blocks = (k // BLOCK)[kept.any(0).any(0)].unique()
                needed[owner] += int(torch.isin(k // BLOCK, blocks).sum())
    return needed


@pytest.mark.parametrize("name", PATTERNS)
def test_only_needed_blocks_travel(name: str) -> None:
    """At most 5 % more than the rows of the blocks that somebody needs."""
    for mask, layout in ((Mask(), "contiguous"), (Mask(causal()), "zigzag")):
        spec = AttentionSpec(H, G, S, is_causal=mask != Mask())
        parts = PATTERNS[name].build_parts(mask, spec)
        place = Layout(layout, 4)
        schedule = build_schedule(parts, place, S)
        for traffic, needed in zip(
            bytes_per_rank(schedule),
            count_needed_rows(parts[0][0], place),
            strict=True,
        ):
            sent, _ = traffic.resolve(ONE_BYTE_ROWS)
            assert sent <= 1.05 * needed, (mask, needed, sent)


def test_a_window_needs_one_neighbour() -> None:
    spec = AttentionSpec(H, G, S, is_causal=True)
    parts = LocalWindow(256).build_parts(Mask(causal()), spec)
    for cp_size in (2, 4, 8):
        schedule = build_schedule(parts, Layout("contiguous", cp_size), S)
        (part,) = schedule.parts
        assert [step.shift for step in part.steps] == [0, 1]
        for traffic in bytes_per_rank(schedule)[:-1]:
            assert traffic.resolve(ONE_BYTE_ROWS)[0] == 2 * BLOCK


@pytest.mark.parametrize("name", PATTERNS)
def test_plans_do_not_depend_on_random_numbers(name: str) -> None:
    texts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        parts = PATTERNS[name].build_parts(Mask(), AttentionSpec(H, G, S))
        schedule = build_schedule(parts, Layout("contiguous", 4), S)
        texts.append(format_schedule(schedule))
        assert torch.equal(state, torch.get_rng_state())
    assert texts[0] == texts[1]
