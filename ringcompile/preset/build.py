"""Patterns of a configuration: what each family of presets makes of its fields."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ringcompile.errors import OptionError
from ringcompile.patterns import (
    Adaptive,
    AtDensity,
    ConsecutiveDilated,
    DilatedBlocks,
    GlobalLocal,
    GroupedDilated,
    Hierarchical,
    LocalWindow,
    LongNet,
    MaskPattern,
    Pattern,
)
from ringcompile.preset.config import RingAttentionConfig

# LongNet's ratio of 4 between neighbours, shortened (arXiv 2307.02486 section 4.2).
SEGMENTS, RATES = (2048, 4096, 8192), (1, 2, 4)
_WINDOW_BLOCKS = 8

DILATED_FIELDS = frozenset({"segment_lengths", "dilation_rates"})
GROUPED_FIELDS = DILATED_FIELDS | {"num_groups"}
BLOCK_FIELDS = frozenset(
    {"pattern_type", "block_size", "window_size", "global_tokens", "sparsity_ratio"}
)


def find_dilation(
    config: RingAttentionConfig,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Segment lengths and dilation rates."""
    if config.segment_lengths is None or config.dilation_rates is None:
        return SEGMENTS, RATES
    return config.segment_lengths, config.dilation_rates


def exact_or_longnet(config: RingAttentionConfig) -> object:
    """Exact, unless segments are given (section 2A)."""
    return "exact" if config.segment_lengths is None else longnet(config)


def longnet(config: RingAttentionConfig) -> LongNet:
    """Every head has every pattern (section 2A)."""
    return LongNet(*find_dilation(config))


def grouped(config: RingAttentionConfig) -> GroupedDilated:
    """Each group of heads has one pattern, the output divided by n (section 2B)."""
    segments, rates = find_dilation(config)
    count = len(segments) if config.num_groups is None else config.num_groups
    if count < len(segments):
        raise OptionError(
            f"num_groups={count} with {len(segments)} segment_lengths",
            at="RingAttentionConfig",
            because=f"{len(segments) - count} of them would have no head",
            instead=f"num_groups={len(segments)} or more, or fewer segment_lengths",
        )
    segments, rates = (
        tuple(values[n % len(values)] for n in range(count))
        for values in (segments, rates)
    )
    return GroupedDilated(segments, rates, divide_by_groups=True)


def consecutive(config: RingAttentionConfig) -> ConsecutiveDilated:
    """Segments laid end to end (section 2C)."""
    return ConsecutiveDilated(*find_dilation(config))


def blocks(config: RingAttentionConfig) -> Pattern:
    """The block layout (section 3)."""
    return _build_blocks(config, config.pattern_type or "local_window")


def spans(config: RingAttentionConfig) -> Pattern:
    """The block layout, of wider spans at coarser strides unless another is named."""
    return _build_blocks(config, config.pattern_type or "hierarchical")


def blocks_and_longnet(config: RingAttentionConfig) -> Pattern:
    """The block layout and section 2A, both."""
    layout = blocks(config)
    if not isinstance(layout, MaskPattern):
        raise OptionError(
            f"pattern_type={config.pattern_type!r} and dilated attention",
            at="RingAttentionConfig",
            because="blocks chosen by their content are no mask that restricts another",
            instead="another pattern_type, or the preset 'block_sparse'",
        )
    return layout & longnet(config)


def _local_window(config: RingAttentionConfig) -> MaskPattern:
    return LocalWindow(_window(config), config.block_size)


def _dilated_blocks(config: RingAttentionConfig) -> MaskPattern:
    """Distances of powers of two, as far as half the window reaches."""
    reach = _window(config) // config.block_size // 2
    rates = tuple(1 << n for n in range(max(reach, 1).bit_length()))
    return DilatedBlocks(rates, config.block_size)


def _global_local(config: RingAttentionConfig) -> MaskPattern:
    tokens = config.block_size if config.global_tokens is None else config.global_tokens
    global_blocks = -(-tokens // config.block_size)
    return GlobalLocal(global_blocks, _window(config), config.block_size)


def _hierarchical(config: RingAttentionConfig) -> MaskPattern:
    """The window, then 4 and 16 times as wide, at 4 and 16 times the stride."""
    span = max(1, _window(config) // config.block_size)
    levels = tuple((span * n, n) for n in (1, 4, 16))
    return Hierarchical(levels, config.block_size)


def _adaptive(config: RingAttentionConfig) -> Pattern:
    """As many blocks as the window has."""
    keep = max(1, _window(config) // config.block_size)
    return Adaptive(keep, block=config.block_size)


def _window(config: RingAttentionConfig) -> int:
    if config.window_size is None:
        return _WINDOW_BLOCKS * config.block_size
    return config.window_size


@dataclass(frozen=True, slots=True)
class _BlockLayout:
    """How one ``pattern_type`` is built, and which fields only some of them read."""

    build: Callable[[RingAttentionConfig], Pattern]
    reads: frozenset[str] = frozenset()


_BLOCK_LAYOUTS: Mapping[str, _BlockLayout] = MappingProxyType(
    {
        "local_window": _BlockLayout(_local_window, frozenset({"sparsity_ratio"})),
        "dilated_sparse": _BlockLayout(_dilated_blocks),
        "global_local": _BlockLayout(
            _global_local, frozenset({"sparsity_ratio", "global_tokens"})
        ),
        "hierarchical": _BlockLayout(_hierarchical),
        "adaptive": _BlockLayout(_adaptive),
    }
)


def _build_blocks(config: RingAttentionConfig, name: str) -> Pattern:
    layout = _BLOCK_LAYOUTS.get(name)
    if layout is None:
        raise OptionError(
            f"pattern_type={name!r}",
            at="RingAttentionConfig",
            because=f"the block layouts are {', '.join(_BLOCK_LAYOUTS)}",
            instead="one of them, or options={'attention': <any pattern object>}",
        )
    for field in ("sparsity_ratio", "global_tokens"):
        value = getattr(config, field)
        if value is not None and field not in layout.reads:
            users = (n for n, other in _BLOCK_LAYOUTS.items() if field in other.reads)
            raise OptionError(
                f"{field}={value} with pattern_type={name!r}",
                at="RingAttentionConfig",
                because="that layout does not read it",
                instead=f"pattern_type={' or '.join(map(repr, users))}, or leave "
                f"{field} out",
            )
    pattern = layout.build(config)
    if config.sparsity_ratio is None:
        return pattern
    assert isinstance(pattern, MaskPattern), "a layout with a window"
    return AtDensity(pattern, config.sparsity_ratio)
