"""``auto``: which preset a configuration gets on which hardware, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from ringcompile.errors import OptionError
from ringcompile.preset import (
    RingAttentionConfig,
    find_hardware,
    pick_preset,
    read_options,
)
from ringcompile.preset.choose import Hardware, choose_preset

ALONE, HOST, HOSTS = Hardware(1), Hardware(8), Hardware(9)
Values = dict[str, object]
SEGMENTS: Values = {"segment_lengths": (8, 24), "dilation_rates": (1, 2)}
WINDOW: Values = {"window_size": 64}
SPANS: Values = {"pattern_type": "hierarchical"}
GROUPS: Values = {"num_groups": 4}
CURVE: Values = {"use_hilbert": True}


@dataclass(frozen=True, slots=True)
class Row:
    """One choice.

    Attributes:
        preset: the name that is chosen.
        reason: why.
        asked: fields of the configuration.
        hardware: what there is.
    """

    preset: str
    reason: str
    asked: Mapping[str, object] = field(default_factory=dict)
    hardware: Hardware = HOST


CURVED = "a block layout, segments and a Hilbert curve are given"
BOTH = "a block layout and segments are given"
SPREAD = "spans of blocks are given, and the ranks fill several hosts"
BLOCKS = "a block layout is given"
RING_GROUPS = "groups of heads are given, over several ranks"
ONE_RANK_GROUPS = "groups of heads are given, on one rank"
CURVE_ALONE = (
    "a Hilbert curve is given; it changes no result, and no speed-up is claimed"
)
DILATED = "segments are given"
FAR = "nothing sparse is given, and the ranks fill several hosts"
PLAIN = "nothing sparse is given: exact"

TABLE = [
    # All three words, and each two of them.
    Row("block_sparse_hilbert", CURVED, SEGMENTS | WINDOW | CURVE),
    Row("block_sparse_hilbert", CURVED, SEGMENTS | SPANS | CURVE, HOSTS),
    Row("block_sparse_dilated", BOTH, SEGMENTS | WINDOW),
    Row("block_sparse_dilated", BOTH, SEGMENTS | SPANS, HOSTS),
    Row("block_sparse", BLOCKS, WINDOW | CURVE),
    Row("hilbert", CURVE_ALONE, SEGMENTS | CURVE),
    # Spans of blocks, on one host and on two.
    Row("block_sparse_distributed", SPREAD, SPANS, HOSTS),
    Row("block_sparse_distributed", SPREAD, SPANS, Hardware(4, 2)),
    Row("block_sparse_distributed", SPREAD, SPANS | CURVE, HOSTS),
    Row("block_sparse", BLOCKS, SPANS, HOST),
    Row("block_sparse", BLOCKS, SPANS, Hardware(4, 4)),
    Row("block_sparse", BLOCKS, {"pattern_type": "global_local"}, HOSTS),
    # Each word of a block layout, and a size that is none.
    Row("block_sparse", BLOCKS, WINDOW),
    Row("block_sparse", BLOCKS, {"pattern_type": "local_window"}),
    Row("block_sparse", BLOCKS, {"global_tokens": 0}),
    Row("block_sparse", BLOCKS, {"sparsity_ratio": 0.5}),
    Row("standard", PLAIN, {"block_size": 32}),
    # Groups of heads, on one rank and on two.
    Row("ring_distributed", RING_GROUPS, GROUPS, Hardware(2)),
    Row("ring_distributed", RING_GROUPS, SEGMENTS | GROUPS | CURVE, HOSTS),
    Row("enterprise", ONE_RANK_GROUPS, GROUPS, ALONE),
    Row("enterprise", ONE_RANK_GROUPS, SEGMENTS | GROUPS, ALONE),
    # One word or none, near and far.
    Row("hilbert", CURVE_ALONE, CURVE),
    Row("hilbert", CURVE_ALONE, CURVE, HOSTS),
    Row("sdpa", DILATED, SEGMENTS),
    Row("sdpa", DILATED, SEGMENTS, HOSTS),
    Row("distributed", FAR, {}, HOSTS),
    Row("distributed", FAR, {}, Hardware(2, 1)),
    Row("standard", PLAIN, {}, HOST),
    Row("standard", PLAIN, {}, ALONE),
    Row("standard", PLAIN, {"use_checkpointing": True, "embed_dim": 8}),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.preset}-{[*r.asked]}")
def test_auto_picks_and_says_why(row: Row) -> None:
    config = RingAttentionConfig.from_dict(row.asked)
    found, reason = choose_preset(config, row.hardware)
    assert found.name == row.preset
    assert reason == f"{row.preset}: {row.reason}"
    assert pick_preset("auto", row.hardware, config) == (found, reason)


def test_every_rule_has_a_row() -> None:
    reasons = {
        *(CURVED, BOTH, SPREAD, BLOCKS, RING_GROUPS),
        *(ONE_RANK_GROUPS, CURVE_ALONE, DILATED, FAR, PLAIN),
    }
    assert {row.reason for row in TABLE} == reasons


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.preset}-{[*r.asked]}")
def test_what_auto_picks_reads_what_was_asked(row: Row) -> None:
    """Or refuses it: of these, the one field that is no word of its own."""
    config = RingAttentionConfig.from_dict(row.asked)
    found, _ = choose_preset(config, row.hardware)
    if "block_size" in row.asked or "global_tokens" in row.asked:
        with pytest.raises(OptionError, match=r"block_size=32|global_tokens=0"):
            found.options(config)
        return
    read_options(found.options(config))


def test_what_auto_cannot_have_together_is_refused_by_name() -> None:
    config = RingAttentionConfig.from_dict(GROUPS | WINDOW)
    found, _ = choose_preset(config, HOST)
    with pytest.raises(OptionError, match="num_groups=4 with the preset 'block_spar"):
        found.options(config)


def test_hardware_decides_between_equal_results_only() -> None:
    """The same configuration computes the same on every machine."""
    for row in TABLE:
        config = RingAttentionConfig.from_dict(row.asked)
        found = [choose_preset(config, h)[0] for h in (ALONE, HOST, HOSTS)]
        if "block_size" in row.asked or "global_tokens" in row.asked:
            continue
        patterns = {str(preset.build(config)) for preset in found}
        assert len(patterns) == 1, (row, patterns)


@pytest.mark.parametrize(
    ("cp_size", "per_node", "nodes"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (16, 8, 2)]
)
def test_ranks_fill_hosts(cp_size: int, per_node: int, nodes: int) -> None:
    assert Hardware(cp_size, per_node).num_nodes == nodes


def test_torchrun_says_how_many_ranks_a_host_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert find_hardware() == Hardware(1, 3)
