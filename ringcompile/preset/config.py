"""One configuration for all presets.

Invariant: each field changes a plan, a graph or a behaviour, or it is refused: what a
preset does not read must be left as it is, and what is not built raises by name.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Self

from ringcompile.errors import OptionError
from ringcompile.patterns.base import freeze, require_not_negative, require_positive

_COUNTS = (
    "num_groups",
    "block_size",
    "window_size",
    "embed_dim",
    "num_heads",
    "ring_size",
    "checkpoint_frequency",
)


@dataclass(frozen=True, slots=True)
class RingAttentionConfig:
    """What a preset is made from; None leaves a choice to the preset.

    Attributes:
        segment_lengths: of dilated attention, tokens ``w_i`` in a segment.
        dilation_rates: ``r_i``, one for each segment length.
        num_groups: of grouped dilated attention, groups of heads; group i has segment
            length and rate number ``i mod n``. None: one group for each.
        pattern_type: the block layout: ``local_window``, ``dilated_sparse``,
            ``global_local``, ``hierarchical`` or ``adaptive``.
        block_size: tokens in a block.
        window_size: tokens that the block layout's window is wide, both sides together.
        global_tokens: first tokens that see and are seen by all, in whole blocks; of
            ``global_local``.
        sparsity_ratio: share of pairs that the block layout keeps, above 0 and at most
            1; in place of ``window_size``.
        use_hilbert: whether each segment's tokens are laid along a Hilbert curve.
        hilbert_curve_level: n of that curve, over ``4^n`` cells; None: the least.
        embed_dim: width of the model: of the multihead module; others hold the size of
            their heads against it.
        num_heads: query heads: of the multihead module; others hold theirs against it.
        bias: whether the multihead module's projections have one.
        dropout: share of attention's weights that training drops, below 1; every tile
            is then computed by plain operators.
        ring_size: ranks that must be there; None: however many there are.
        communication_backend: how hops travel: the option ``transport``.
        overlap_communication: whether tiles are computed while the next ones' keys and
            values travel. False: all travel first, and all lie on each rank.
        use_fused_kernels: False: plain operators, slow and easy to trust.
        compile_mode: Inductor's mode.
        use_checkpointing: whether attention is computed again in backward.
        checkpoint_frequency: so it is in every so-many-th layer.
        validate_gradients: whether a gradient that is not finite raises, naming rank
            and tensor.
        enable_watchdog: whether a late transfer raises; always.
        watchdog_timeout: seconds after which it does: the option ``timeout_s``.
        enable_error_recovery: not built yet.
        max_retry_attempts: not built yet.
        retry_delay: not built yet.
        use_memory_pool: not built yet.
        preallocate_buffers: not built yet.
        max_cached_buffers: not built yet.
        aggressive_memory_cleanup: not built yet.
        enable_profiling: not built yet.
        log_communication_stats: not built yet.
    """

    segment_lengths: tuple[int, ...] | None = None
    dilation_rates: tuple[int, ...] | None = None
    num_groups: int | None = None
    pattern_type: str | None = None
    block_size: int = 64
    window_size: int | None = None
    global_tokens: int | None = None
    sparsity_ratio: float | None = None
    use_hilbert: bool = False
    hilbert_curve_level: int | None = None
    embed_dim: int | None = None
    num_heads: int | None = None
    bias: bool = True
    dropout: float = 0.0
    ring_size: int | None = None
    communication_backend: str = "auto"
    overlap_communication: bool = True
    use_fused_kernels: bool = True
    compile_mode: str | None = None
    use_checkpointing: bool = False
    checkpoint_frequency: int = 1
    validate_gradients: bool = False
    enable_watchdog: bool = True
    watchdog_timeout: float = 600.0
    enable_error_recovery: bool = False
    max_retry_attempts: int = 3
    retry_delay: float = 1.0
    use_memory_pool: bool = False
    preallocate_buffers: bool = False
    max_cached_buffers: int = 50
    aggressive_memory_cleanup: bool = False
    enable_profiling: bool = False
    log_communication_stats: bool = False

    def __post_init__(self) -> None:
        for name in ("segment_lengths", "dilation_rates"):
            if getattr(self, name) is not None:
                freeze(self, name)
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if isinstance(default, bool) and not isinstance(value, bool):
                raise OptionError(
                    f"{name}={value!r}",
                    at=_NAME,
                    because="it is switched on or off",
                    instead=f"{name}=True or {name}=False",
                )
        given = {n: v for n in _COUNTS if (v := getattr(self, n)) is not None}
        require_positive(_NAME, **given)
        if self.global_tokens is not None:
            require_not_negative(_NAME, global_tokens=self.global_tokens)
        self._check_pairs()
        self._check_what_is_built()

    def _check_pairs(self) -> None:
        for one, other in (
            ("segment_lengths", "dilation_rates"),
            ("dilation_rates", "segment_lengths"),
        ):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise OptionError(
                    f"{one}={getattr(self, one)} with {other}=None",
                    at=_NAME,
                    because="each segment length has one rate",
                    instead=f"as many {other}, or neither of both",
                )
        self._check_words()
        is_number = isinstance(self.dropout, int | float)
        if not (is_number and 0 <= self.dropout < 1):
            raise OptionError(
                f"dropout={self.dropout!r}",
                at=_NAME,
                because="weights that are kept are divided by 1 - dropout",
                instead="a share of at least 0 and below 1",
            )
        if self.sparsity_ratio is not None and self.window_size is not None:
            raise OptionError(
                f"sparsity_ratio={self.sparsity_ratio} with "
                f"window_size={self.window_size}",
                at=_NAME,
                because="either of them says how wide the window is",
                instead="one of them",
            )
        if self.embed_dim and self.num_heads and self.embed_dim % self.num_heads:
            raise OptionError(
                f"embed_dim={self.embed_dim} with num_heads={self.num_heads}",
                at=_NAME,
                because="heads are equal parts of the width",
                instead=f"embed_dim={-(-self.embed_dim // self.num_heads)} * "
                f"{self.num_heads}, or num_heads that divide {self.embed_dim}",
            )
        if self.checkpoint_frequency > 1 and not self.use_checkpointing:
            raise OptionError(
                f"checkpoint_frequency={self.checkpoint_frequency} with "
                "use_checkpointing=False",
                at=_NAME,
                because="no layer is checkpointed",
                instead="use_checkpointing=True, or leave checkpoint_frequency out",
            )

    def _check_words(self) -> None:
        """What options of the backend would name by another word."""
        for name, fits, wanted in (
            ("communication_backend", self.communication_backend in _TRANSPORTS, ""),
            ("watchdog_timeout", _is_above_zero(self.watchdog_timeout), "seconds > 0"),
            (
                "sparsity_ratio",
                self.sparsity_ratio is None
                or (_is_above_zero(self.sparsity_ratio) and self.sparsity_ratio <= 1),
                "above 0 and at most 1",
            ),
        ):
            if not fits:
                raise OptionError(
                    f"{name}={getattr(self, name)!r}",
                    at=_NAME,
                    because="it has no such value",
                    instead=wanted or " or ".join(map(repr, _TRANSPORTS)),
                )

    def _check_what_is_built(self) -> None:
        for name in NOT_BUILT:
            value, default = getattr(self, name), _DEFAULTS[name]
            if value != default:
                raise OptionError(
                    f"{name}={value!r}",
                    at=_NAME,
                    because="not built yet",
                    instead=f"leave it out for {default!r}",
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Read what ``to_dict`` gave, or part of it.

        Raises:
            OptionError: a key is no field, or a value is none of its values.
        """
        for key in values:
            if key not in _DEFAULTS:
                (nearest,) = difflib.get_close_matches(
                    str(key), _DEFAULTS, n=1, cutoff=0.0
                )
                raise OptionError(
                    f"unknown field {key!r}",
                    at=_NAME,
                    because=f"the fields are {', '.join(_DEFAULTS)}",
                    instead=f"did you mean {nearest!r}?",
                )
        return cls(**values)  # type: ignore[arg-type] # __post_init__ checks them

    @classmethod
    def from_params(cls, **values: object) -> Self:
        """The same from keywords."""
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, object]:
        """Every field as JSON can hold it."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def development(cls, **values: object) -> Self:
        """For finding faults: plain operators, and gradients are checked."""
        return cls.from_dict(
            {"use_fused_kernels": False, "validate_gradients": True} | values
        )

    @classmethod
    def production(cls, **values: object) -> Self:
        """For serving and training: the device's kernels, and late peers are told."""
        return cls.from_dict({"watchdog_timeout": 120.0} | values)

    @classmethod
    def large_scale(cls, **values: object) -> Self:
        """For long sequences: attention is computed again, and peers may be slower."""
        return cls.from_dict(
            {"use_checkpointing": True, "watchdog_timeout": 1800.0} | values
        )


_TRANSPORTS = ("auto", "p2p")


def _is_above_zero(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value > 0  # type: ignore[operator]


_NAME = RingAttentionConfig.__name__
_DEFAULTS = {f.name: f.default for f in fields(RingAttentionConfig)}
NOT_BUILT = (
    "enable_watchdog",
    "enable_error_recovery",
    "max_retry_attempts",
    "retry_delay",
    "use_memory_pool",
    "preallocate_buffers",
    "max_cached_buffers",
    "aggressive_memory_cleanup",
    "enable_profiling",
    "log_communication_stats",
)


def changed_fields(config: RingAttentionConfig) -> tuple[str, ...]:
    """Fields whose value is not the default."""
    return tuple(n for n, v in _DEFAULTS.items() if getattr(config, n) != v)
