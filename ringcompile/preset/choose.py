"""The preset for ``"auto"``: by what the configuration asks for and what is there.

Hardware decides between presets of equal results only. Invariant: the first rule that
holds decides, and its reason is told.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ringcompile.preset.config import RingAttentionConfig
from ringcompile.preset.table import Preset, presets

_BLOCK_WORDS = ("pattern_type", "window_size", "global_tokens", "sparsity_ratio")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What there is to run on.

    Attributes:
        cp_size: ranks that share a sequence.
        ranks_per_node: ranks of one host.
    """

    cp_size: int = 1
    ranks_per_node: int = 8

    @property
    def num_nodes(self) -> int:
        """Hosts that the ranks fill."""
        return -(-self.cp_size // self.ranks_per_node)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a configuration asks for, in one word each."""

    config: RingAttentionConfig
    hardware: Hardware

    @property
    def blocks(self) -> bool:
        return any(getattr(self.config, name) is not None for name in _BLOCK_WORDS)

    @property
    def segments(self) -> bool:
        return self.config.segment_lengths is not None

    @property
    def groups(self) -> bool:
        return self.config.num_groups is not None

    @property
    def curve(self) -> bool:
        return self.config.use_hilbert

    @property
    def ring(self) -> bool:
        return self.hardware.cp_size > 1

    @property
    def nodes(self) -> bool:
        return self.hardware.num_nodes > 1

    @property
    def spans(self) -> bool:
        return self.config.pattern_type == "hierarchical"


_RULES: tuple[tuple[Callable[[_Asked], bool], str, str], ...] = (
    (
        lambda a: a.blocks and a.segments and a.curve,
        "block_sparse_hilbert",
        "a block layout, segments and a Hilbert curve are given",
    ),
    (
        lambda a: a.blocks and a.segments,
        "block_sparse_dilated",
        "a block layout and segments are given",
    ),
    (
        lambda a: a.spans and a.nodes,
        "block_sparse_distributed",
        "spans of blocks are given, and the ranks fill several hosts",
    ),
    (lambda a: a.blocks, "block_sparse", "a block layout is given"),
    (
        lambda a: a.groups and a.ring,
        "ring_distributed",
        "groups of heads are given, over several ranks",
    ),
    (lambda a: a.groups, "enterprise", "groups of heads are given, on one rank"),
    (
        lambda a: a.curve,
        "hilbert",
        "a Hilbert curve is given; it changes no result, and no speed-up is claimed",
    ),
    (lambda a: a.segments, "sdpa", "segments are given"),
    (
        lambda a: a.nodes,
        "distributed",
        "nothing sparse is given, and the ranks fill several hosts",
    ),
    (lambda _: True, "standard", "nothing sparse is given: exact"),
)


def choose_preset(
    config: RingAttentionConfig, hardware: Hardware
) -> tuple[Preset, str]:
    """Choose a preset.

    Args:
        config: what is asked for.
        hardware: what there is.

    Returns:
        The preset and the reason in words.
    """
    asked = _Asked(config, hardware)
    holds, name, reason = next(rule for rule in _RULES if rule[0](asked))
    del holds
    return presets()[name], f"{name}: {reason}"
