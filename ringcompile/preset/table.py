"""The presets: the fourteen systems of SEMANTICS.md section 6, and ``auto``.

A preset is an attention pattern and options of the compiler, made from a configuration.
Invariant: a field of the configuration that a preset does not read is refused unless it
has its default.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ringcompile.errors import OptionError
from ringcompile.preset import build
from ringcompile.preset.config import NOT_BUILT, RingAttentionConfig, changed_fields

# What every preset reads: how it runs, and what of the module around it is known.
_COMMON = frozenset(
    {
        *NOT_BUILT,
        "use_hilbert",
        "hilbert_curve_level",
        "embed_dim",
        "num_heads",
        "dropout",
        "ring_size",
        "communication_backend",
        "overlap_communication",
        "use_fused_kernels",
        "compile_mode",
        "use_checkpointing",
        "checkpoint_frequency",
        "validate_gradients",
        "watchdog_timeout",
    }
)


@dataclass(frozen=True, slots=True)
class Preset:
    """One system of the list.

    Attributes:
        name: what ``options={"attention": ...}`` and ``create_ring_attention`` take.
        means: what it computes, in words.
        build: makes the pattern, or ``"exact"``, from a configuration.
        reads: fields of the configuration that it reads, beside the common ones.
        compile_options: the backend's options that belong to it.
        services_off: services of the original that are not built yet; it runs without.
        aliases: class names of the original.
    """

    name: str
    means: str
    build: Callable[[RingAttentionConfig], object]
    reads: frozenset[str]
    compile_options: Mapping[str, object] = field(default_factory=dict)
    services_off: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def options(
        self,
        config: RingAttentionConfig | None = None,
        *,
        is_multihead: bool = False,
    ) -> dict[str, object]:
        """The backend's options: ``torch.compile(model, backend="ring", options=...)``.

        Args:
            config: None for the defaults.
            is_multihead: whether the multihead module reads its fields too.

        Raises:
            OptionError: the preset does not read a field that was changed.
        """
        config = config or RingAttentionConfig()
        others = frozenset({"bias"}) if is_multihead else frozenset()
        refuse_unread(config, self.reads | others, self.name, because=self.means)
        return {
            "attention": self.build(config),
            **self.compile_options,
            **_how_it_runs(config),
        }

    def note(self) -> str:
        """What of the original is left out, or nothing."""
        if not self.services_off:
            return ""
        return f"preset {self.name}: not built yet, and off: " + ", ".join(
            self.services_off
        )


def run_options(config: RingAttentionConfig) -> dict[str, object]:
    """The backend's options that say how a pattern of the user's own runs.

    Raises:
        OptionError: a field was changed that makes a preset's pattern.
    """
    because = "the pattern is given as such"
    refuse_unread(config, frozenset({"bias"}), "a pattern", because=because)
    return _how_it_runs(config)


def _how_it_runs(config: RingAttentionConfig) -> dict[str, object]:
    options: dict[str, object] = {
        "transport": config.communication_backend,
        "timeout_s": config.watchdog_timeout,
    }
    if config.use_hilbert:
        options["layout"] = "hilbert"
    if config.hilbert_curve_level is not None:
        options["hilbert_level"] = config.hilbert_curve_level
    if not config.use_fused_kernels:
        options["kernel"] = "math"
    if not config.overlap_communication:
        options["stages"] = 1
    return options


def refuse_unread(
    config: RingAttentionConfig, reads: frozenset[str], name: str, *, because: str
) -> None:
    """Raise if a field was changed that nothing reads."""
    for field_name in changed_fields(config):
        if field_name not in reads | _COMMON:
            users = [p.name for p in presets().values() if field_name in p.reads]
            raise OptionError(
                f"{field_name}={getattr(config, field_name)!r} with the preset {name!r}"
                if name in _BY_NAME
                else f"{field_name}={getattr(config, field_name)!r} with {name}",
                at="RingAttentionConfig",
                because=f"{because}: it does not read {field_name}",
                instead=f"one of {', '.join(users)}, or leave {field_name} out",
            )


_DISTRIBUTED = ("ZeRO", "gradient compression", "monitoring", "error recovery")
_ENTERPRISE = ("error recovery", "memory pool", "gradient compression")

_PRESETS = (
    Preset(
        "standard",
        "exact ring, or a dilated one where segments are given",
        build.exact_or_longnet,
        build.DILATED_FIELDS,
        aliases=(
            "StandardRingAttention",
            "RingDilatedAttention",
            "RingDilatedAttentionProduction",
        ),
    ),
    Preset(
        "hilbert",
        "standard, each segment along a Hilbert curve",
        build.exact_or_longnet,
        build.DILATED_FIELDS,
        {"layout": "hilbert"},
        aliases=("HilbertRingAttention",),
    ),
    Preset(
        "distributed",
        "standard",
        build.exact_or_longnet,
        build.DILATED_FIELDS,
        services_off=_DISTRIBUTED,
        aliases=("DistributedRingAttention",),
    ),
    Preset(
        "block_sparse",
        "blocks; only those travel that somebody sees",
        build.blocks,
        build.BLOCK_FIELDS,
        aliases=("BlockSparseRingAttention",),
    ),
    Preset(
        "hilbert_gpu",
        "segments end to end, each along a Hilbert curve",
        build.consecutive,
        build.DILATED_FIELDS,
        {"layout": "hilbert"},
        aliases=("RingDilatedAttentionHilbertGPUOptimized",),
    ),
    Preset(
        "reference",
        "segments end to end, by plain operators in float32",
        build.consecutive,
        build.DILATED_FIELDS,
        {"kernel": "math"},
        aliases=("RingDilatedAttentionCorrect", "RingAttentionWrapper"),
    ),
    Preset(
        "sdpa",
        "every head has every dilated pattern, on gathered rows",
        build.longnet,
        build.DILATED_FIELDS,
        aliases=("RingDilatedAttentionSDPA",),
    ),
    Preset(
        "enterprise",
        "each group of heads has one dilated pattern, divided by their number",
        build.grouped,
        build.GROUPED_FIELDS,
        services_off=_ENTERPRISE,
        aliases=("EnterpriseDistributedDilatedAttention",),
    ),
    Preset(
        "ring_distributed",
        "enterprise over the ring",
        build.grouped,
        build.GROUPED_FIELDS,
        services_off=_ENTERPRISE,
        aliases=("RingDistributedDilatedAttention",),
    ),
    Preset(
        "block_sparse_dilated",
        "blocks and dilated patterns, what both keep",
        build.blocks_and_longnet,
        build.BLOCK_FIELDS | build.DILATED_FIELDS,
        aliases=("BlockSparseRingDilatedAttention",),
    ),
    Preset(
        "block_sparse_fixed",
        "block_sparse_dilated through the one configuration",
        build.blocks_and_longnet,
        build.BLOCK_FIELDS | build.DILATED_FIELDS,
        aliases=("BlockSparseRingDilatedAttentionFixed",),
    ),
    Preset(
        "block_sparse_hilbert",
        "block_sparse_dilated, its tiles' blocks visited along a Hilbert curve",
        build.blocks_and_longnet,
        build.BLOCK_FIELDS | build.DILATED_FIELDS,
        {"block_order": "hilbert"},
        aliases=("BlockSparseRingDilatedAttentionHilbertPostPattern",),
    ),
    Preset(
        "block_sparse_multihead",
        "block_sparse_dilated in the place of nn.MultiheadAttention",
        build.blocks_and_longnet,
        build.BLOCK_FIELDS | build.DILATED_FIELDS | {"bias"},
        aliases=("BlockSparseRingMultiheadDilatedAttention",),
    ),
    Preset(
        "block_sparse_distributed",
        "blocks of wider spans at coarser strides",
        build.spans,
        build.BLOCK_FIELDS,
        services_off=_DISTRIBUTED,
        aliases=("BlockSparseRingDistributedDilatedAttention",),
    ),
)

_BY_NAME: Mapping[str, Preset] = MappingProxyType({p.name: p for p in _PRESETS})
_BY_ALIAS = {alias: preset for preset in _PRESETS for alias in preset.aliases}


def presets() -> dict[str, Preset]:
    """All presets by name, in the order of the list.

    ``"auto"``, which picks one of them, is no preset of its own.
    """
    return dict(_BY_NAME)


def find_preset(name: str) -> Preset:
    """The preset of a name or of a class name of the original.

    Raises:
        OptionError: there is none.
    """
    found = _BY_NAME.get(name) or _BY_ALIAS.get(name)
    if found is None:
        known = ["exact", "auto", *_BY_NAME, *_BY_ALIAS]
        (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise OptionError(
            f"attention={name!r}",
            at="options",
            because=f"it is neither 'exact' nor a preset: {', '.join(_BY_NAME)}, auto",
            instead=f"did you mean {nearest!r}? Or a pattern object of "
            "ringcompile.patterns",
        )
    return found
