"""Every preset at small sizes, and what it computes, written from SEMANTICS.md 6."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ringcompile import patterns as p
from ringcompile.preset import RingAttentionConfig, presets
from support.pattern_cases import (
    LOCAL,
    LONGNET,
    Counts,
    PatternCase,
    adaptive,
    consecutive,
    dilated_blocks,
    global_local,
    grouped,
    hierarchical,
    keep_all,
    local_window,
    within,
)


@dataclass(frozen=True, slots=True)
class PresetCase:
    """One preset.

    Attributes:
        preset: its name.
        config: fields of its configuration.
        meaning: what it computes; of ``EXACT`` the pattern is no part of the options.
        own: options that it must have, whatever the configuration.
        heads: H and G.
    """

    preset: str
    config: Mapping[str, Any]
    meaning: PatternCase
    own: Mapping[str, object] = field(default_factory=dict)
    heads: tuple[int, int] = (4, 2)

    def options(self) -> dict[str, object]:
        config = RingAttentionConfig.from_dict(self.config)
        return presets()[self.preset].options(config)


def _keep_all(b: object, h: object, q: object, k: object) -> bool:
    del b, h, q, k
    return True


def _at_density(share: float, block: int) -> PatternCase:
    """The local window whose share of pairs is nearest, the narrower of two."""

    def of(*, is_causal: bool) -> Counts:
        def counts(H: int, G: int, S: int) -> Tensor:
            pairs = S * (S + 1) / 2 if is_causal else S * S

            def far(case: PatternCase) -> float:
                kept = case.count(1, 1, S, is_causal=is_causal).sum().item()
                return abs(kept / pairs - share)

            windows = (block, *range(2 * block, 2 * S + block, 2 * block))
            return min((local_window(w, block) for w in windows), key=far).counts(
                H, G, S
            )

        return counts

    pattern = p.AtDensity(p.LocalWindow(8 * block, block), share)
    return PatternCase(pattern, of(is_causal=False), of(is_causal=True))


EXACT = PatternCase(p.Custom(_keep_all), keep_all)
_SEGMENTS, _RATES = (8, 24, 48), (1, 2, 4)
_DILATED = {"segment_lengths": _SEGMENTS, "dilation_rates": _RATES}
_SHORT = {"segment_lengths": (9, 20, 11), "dilation_rates": _RATES}
_BLOCKS: dict[str, object] = {"block_size": 4, "window_size": 16}
_BOTH = within(LOCAL, LONGNET)
_HILBERT, _MATH = {"layout": "hilbert"}, {"kernel": "math"}
_DIVIDED = grouped(_SEGMENTS, _RATES, divides=True)
_UNEVEN = grouped((8, 24, 48, 8, 24), (1, 2, 4, 1, 2), divides=True)
_FIVE = _DILATED | {"num_groups": 5}

PRESETS: dict[str, PresetCase] = {
    "standard": PresetCase("standard", _DILATED, LONGNET),
    "standard, exact": PresetCase("standard", {}, EXACT),
    "hilbert": PresetCase("hilbert", _DILATED, LONGNET, _HILBERT),
    "hilbert, exact": PresetCase("hilbert", {}, EXACT, _HILBERT),
    "distributed": PresetCase("distributed", _DILATED, LONGNET),
    "distributed, exact": PresetCase("distributed", {}, EXACT),
    "block_sparse": PresetCase("block_sparse", _BLOCKS, LOCAL),
    "block_sparse, dilated_sparse": PresetCase(
        "block_sparse",
        {"pattern_type": "dilated_sparse", "block_size": 4, "window_size": 32},
        dilated_blocks((1, 2, 4), 4),
    ),
    "block_sparse, global_local": PresetCase(
        "block_sparse",
        {"pattern_type": "global_local", "global_tokens": 7, **_BLOCKS},
        global_local(2, 16, 4),
    ),
    "block_sparse, adaptive": PresetCase(
        "block_sparse", {"pattern_type": "adaptive", **_BLOCKS}, adaptive(4, 4)
    ),
    "block_sparse, a third": PresetCase(
        "block_sparse",
        {"sparsity_ratio": 1 / 3, "block_size": 4},
        _at_density(1 / 3, 4),
    ),
    "hilbert_gpu": PresetCase(
        "hilbert_gpu", _DILATED, consecutive(_SEGMENTS, _RATES), _HILBERT
    ),
    "reference": PresetCase(
        "reference", _SHORT, consecutive((9, 20, 11), _RATES), _MATH
    ),
    "sdpa": PresetCase("sdpa", _DILATED, LONGNET),
    "enterprise": PresetCase("enterprise", _DILATED, _DIVIDED),
    "enterprise, 5 groups": PresetCase("enterprise", _FIVE, _UNEVEN, heads=(12, 4)),
    "ring_distributed": PresetCase("ring_distributed", _DILATED, _DIVIDED),
    "ring_distributed, 5 groups": PresetCase(
        "ring_distributed", _FIVE, _UNEVEN, heads=(12, 4)
    ),
    "block_sparse_dilated": PresetCase(
        "block_sparse_dilated", _DILATED | _BLOCKS, _BOTH
    ),
    "block_sparse_fixed": PresetCase("block_sparse_fixed", _DILATED | _BLOCKS, _BOTH),
    "block_sparse_hilbert": PresetCase(
        "block_sparse_hilbert", _DILATED | _BLOCKS, _BOTH, {"block_order": "hilbert"}
    ),
    "block_sparse_multihead": PresetCase(
        "block_sparse_multihead", _DILATED | _BLOCKS, _BOTH
    ),
    "block_sparse_distributed": PresetCase(
        "block_sparse_distributed",
        {"block_size": 4, "window_size": 8},
        hierarchical(((2, 1), (8, 4), (32, 16)), 4),
    ),
}
