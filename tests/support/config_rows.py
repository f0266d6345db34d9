"""How each field of the configuration is seen to be read: a row for each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringcompile import OptionError, RingCompileError, create_ring_attention
from ringcompile.config import RingOptions
from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask, causal
from ringcompile.ir.text import format_schedule
from ringcompile.modules import runner
from ringcompile.modules.runner import Runner
from ringcompile.patterns import AttentionSpec, Pattern
from ringcompile.patterns.base import find_segment
from ringcompile.plan.stages import build_schedule
from ringcompile.preset import RingAttentionConfig, find_preset, read_options
from ringcompile.preset.config import NOT_BUILT

FIELDS = {f.name: f.default for f in fields(RingAttentionConfig)}
LENGTH = 96


@dataclass(frozen=True, slots=True)
class Change:
    """One field changed, all others equal.

    Attributes:
        name: the field.
        row: how it is seen.
    """

    name: str
    row: "Row"

    def config(self, value: object) -> RingAttentionConfig:
        return RingAttentionConfig.from_dict({**self.row.others, self.name: value})

    @property
    def configs(self) -> tuple[RingAttentionConfig, RingAttentionConfig]:
        before = FIELDS[self.name] if self.row.before is None else self.row.before
        return self.config(before), self.config(self.row.after)

    @property
    def options(self) -> tuple[RingOptions, RingOptions]:
        before, after = (options_of(self.row.preset, c) for c in self.configs)
        return before, after


@dataclass(frozen=True, slots=True)
class Row:
    """How one field is seen to be read.

    Attributes:
        check: raises unless the change has its effect.
        preset: whose configuration it is.
        after: the changed value.
        before: the value that it is compared with; None for the default.
        others: other fields, equal before and after.
        option: of the backend, which it changes to ``value``.
        value: of that option.
    """

    check: Callable[[Change], None]
    preset: str
    after: object
    before: object = None
    others: Mapping[str, object] = field(default_factory=dict)
    option: str = ""
    value: object = None


# ---- effects -------------------------------------------------------------------------


def options_of(preset: str, config: RingAttentionConfig) -> RingOptions:
    return read_options(find_preset(preset).options(config))


def schedule_of(options: RingOptions) -> str:
    """What two ranks do: the plan of a causal attention under a pattern."""
    pattern = options.attention
    assert isinstance(pattern, Pattern)
    spec = AttentionSpec(4, 2, LENGTH, is_causal=True)
    layout = Layout("contiguous", 4)
    if options.layout == "hilbert":
        layout = Layout("hilbert", 4, find_segment(pattern), options.hilbert_level)
    num_stages = options.stages if isinstance(options.stages, int) else None
    parts = pattern.build_parts(Mask(causal()), spec)
    return format_schedule(build_schedule(parts, layout, LENGTH, num_stages=num_stages))


def changes_pattern(change: Change) -> None:
    """The pattern, what is planned from it, and no other option."""
    one, other = change.options
    assert one.attention != other.attention
    assert replace(one, attention="exact") == replace(other, attention="exact")
    assert schedule_of(one) != schedule_of(other)


def changes_option(change: Change) -> None:
    """An option of the backend, and no other."""
    one, other = change.options
    option, value = change.row.option, change.row.value
    assert getattr(one, option) != value
    assert replace(one, **{option: value}) == other  # type: ignore[arg-type]


def changes_plan(change: Change) -> None:
    """An option of the backend, and what is planned under it."""
    changes_option(change)
    one, other = change.options
    assert schedule_of(one) != schedule_of(other)


def changes_module(change: Change) -> None:
    """Parameters or heads of the module."""

    def look(config: RingAttentionConfig) -> tuple[object, ...]:
        module: Any = create_ring_attention(change.row.preset, config)
        shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
        return module.num_heads, shapes

    before, after = change.configs
    assert look(before) != look(after)


def changes_module_and_is_held_against_heads(change: Change) -> None:
    """Width or heads of the multihead module; of others, an error if they differ."""
    changes_module(change)
    x = torch.zeros(1, 4, 2, 8)  # 2 heads of 8
    number = change.row.after
    module = create_ring_attention("standard", change.config(number))
    with pytest.raises(OptionError, match=rf"{change.name}={number}\b"):
        module(x, x, x)


def needs_as_many_ranks(change: Change) -> None:
    before, after = change.configs
    create_ring_attention(change.row.preset, before)
    with pytest.raises(OptionError, match=f"{change.name}={change.row.after} over 1 "):
        create_ring_attention(change.row.preset, after)


def runner_of(preset: str, config: RingAttentionConfig, layer: int = 0) -> Runner:
    module: Any = create_ring_attention(preset, config, layer=layer)
    found = module._runner
    assert isinstance(found, Runner)
    return found


def changes_inductors_patches(change: Change) -> None:
    one, other = (runner_of(change.row.preset, c).options for c in change.configs)
    assert one.inductor_patches == {}
    assert other.inductor_patches["max_autotune"] is True
    assert replace(one, inductor=other.inductor) == other


def leave(function: object, *_how: object) -> object:
    """In the place of compiling."""
    return function


def run_eagerly(
    runs: Runner, function: Callable[[Tensor], Tensor], value: float
) -> None:
    """Forward and backward of what a module's runner makes of a function."""
    x = torch.full((1, 2), value, requires_grad=True)
    with patch.object(runner, "_compile", leave):
        runs.run(function, x, training=True).sum().backward()


def count_runs(preset: str, config: RingAttentionConfig, layer: int) -> int:
    """How often attention is computed in one forward and backward."""
    calls = []

    def attend(x: Tensor) -> Tensor:
        calls.append(x)
        return x.sin()

    run_eagerly(runner_of(preset, config, layer), attend, 1.0)
    return len(calls)


def computes_again_in_layer(
    layer: int, *, before: int, after: int
) -> Callable[[Change], None]:
    def check(change: Change) -> None:
        counts = [count_runs(change.row.preset, c, layer) for c in change.configs]
        assert counts == [before, after]

    return check


def watches_gradients(change: Change) -> None:
    one, other = (runner_of(change.row.preset, c) for c in change.configs)
    run_eagerly(one, torch.sqrt, 0.0)
    with pytest.raises(RingCompileError, match=r"(?s)not finite.*rank 0, standard"):
        run_eagerly(other, torch.sqrt, 0.0)


def drops_weights(change: Change) -> None:
    """In training alone."""
    dropped = []

    def attend(
        q: Tensor, *_rest: Tensor, dropout_p: float = 0.0, **_: object
    ) -> Tensor:
        dropped.append(dropout_p)
        return q

    x = torch.zeros(1, 4, 2, 8)
    with (
        patch.object(runner, "_compile", leave),
        patch.object(torch.compiler, "is_compiling", lambda: True),
        patch.object(F, "scaled_dot_product_attention", attend),
    ):
        for config in change.configs:
            module = create_ring_attention(change.row.preset, config)
            module.train()(x, x, x)
            module.eval()(x, x, x)
    assert dropped == [0.0, 0.0, change.row.after, 0.0]


def is_not_built(change: Change) -> None:
    assert change.name in NOT_BUILT
    with pytest.raises(OptionError, match=f"(?s)^{change.name}=.*not built yet"):
        change.config(change.row.after)


# ---- a row for each field ------------------------------------------------------------

WIDE = {"embed_dim": 16, "num_heads": 4}
MULTIHEAD = "block_sparse_multihead"
DILATION = {"segment_lengths": (8, 24), "dilation_rates": (1, 2)}
ROWS: dict[str, Row] = {
    "segment_lengths": Row(
        *(changes_pattern, "sdpa", (8, 32), (8, 24), {"dilation_rates": (1, 2)})
    ),
    "dilation_rates": Row(
        *(changes_pattern, "sdpa", (1, 4), (1, 2), {"segment_lengths": (8, 24)})
    ),
    "num_groups": Row(changes_pattern, "enterprise", 4, others=DILATION),
    "pattern_type": Row(
        changes_pattern, "block_sparse", "dilated_sparse", others={"block_size": 4}
    ),
    "block_size": Row(changes_pattern, "block_sparse", 4),
    "window_size": Row(changes_pattern, "block_sparse", 8, others={"block_size": 4}),
    "global_tokens": Row(
        *(changes_pattern, "block_sparse", 17),
        others={"block_size": 4, "pattern_type": "global_local"},
    ),
    "sparsity_ratio": Row(
        changes_pattern, "block_sparse", 0.2, others={"block_size": 4}
    ),
    "use_hilbert": Row(
        *(changes_plan, "sdpa", True),
        others=DILATION,
        option="layout",
        value="hilbert",
    ),
    "hilbert_curve_level": Row(
        *(changes_plan, "sdpa", 4),
        others=DILATION | {"use_hilbert": True},
        option="hilbert_level",
        value=4,
    ),
    "embed_dim": Row(
        changes_module_and_is_held_against_heads, MULTIHEAD, 32, before=16, others=WIDE
    ),
    "num_heads": Row(
        changes_module_and_is_held_against_heads, MULTIHEAD, 8, before=4, others=WIDE
    ),
    "bias": Row(changes_module, MULTIHEAD, False, others=WIDE),
    "dropout": Row(drops_weights, "standard", 0.25),
    "ring_size": Row(needs_as_many_ranks, "standard", 2),
    "communication_backend": Row(
        changes_option, "standard", "p2p", option="transport", value="p2p"
    ),
    "overlap_communication": Row(
        *(changes_plan, "sdpa", False),
        others=DILATION | {"segment_lengths": (8, LENGTH)},
        option="stages",
        value=1,
    ),
    "use_fused_kernels": Row(
        changes_option, "standard", False, option="kernel", value="math"
    ),
    "compile_mode": Row(changes_inductors_patches, "standard", "max-autotune"),
    "use_checkpointing": Row(
        computes_again_in_layer(0, before=1, after=2), "standard", True
    ),
    "checkpoint_frequency": Row(
        *(computes_again_in_layer(2, before=2, after=1), "standard", 3),
        others={"use_checkpointing": True},
    ),
    "validate_gradients": Row(watches_gradients, "standard", True),
    "enable_watchdog": Row(is_not_built, "standard", False),
    "watchdog_timeout": Row(
        changes_option, "standard", 5.0, option="timeout_s", value=5.0
    ),
    "enable_error_recovery": Row(is_not_built, "standard", True),
    "max_retry_attempts": Row(is_not_built, "standard", 5),
    "retry_delay": Row(is_not_built, "standard", 2.0),
    "use_memory_pool": Row(is_not_built, "standard", True),
    "preallocate_buffers": Row(is_not_built, "standard", True),
    "max_cached_buffers": Row(is_not_built, "standard", 9),
    "aggressive_memory_cleanup": Row(is_not_built, "standard", True),
    "enable_profiling": Row(is_not_built, "standard", True),
    "log_communication_stats": Row(is_not_built, "standard", True),
}
