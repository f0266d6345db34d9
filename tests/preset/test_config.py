"""Each field of the configuration is read or refused; none is dropped."""

import json
import re
from collections.abc import Mapping

import pytest
import torch
from support.config_rows import (
    DILATION,
    FIELDS,
    MULTIHEAD,
    ROWS,
    WIDE,
    Change,
    count_runs,
    is_not_built,
    options_of,
    run_eagerly,
    runner_of,
)

from ringcompile import OptionError, RingCompileError, create_ring_attention
from ringcompile.preset import RingAttentionConfig, find_preset, presets
from ringcompile.preset.config import NOT_BUILT, changed_fields


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_changes_what_runs_or_is_not_built(name: str) -> None:
    row = ROWS[name]  # a new field needs a row
    row.check(Change(name, row))


def test_a_field_is_either_built_or_refused() -> None:
    refused = {name for name, row in ROWS.items() if row.check is is_not_built}
    assert refused == set(NOT_BUILT)
    assert list(ROWS) == list(FIELDS)


@pytest.mark.parametrize(("layer", "runs"), [(0, 2), (1, 1), (2, 1), (3, 2)])
def test_every_third_layer_is_computed_again(layer: int, runs: int) -> None:
    config = RingAttentionConfig(use_checkpointing=True, checkpoint_frequency=3)
    assert count_runs("sdpa", config, layer) == runs


# ---- which preset reads which --------------------------------------------------------

DILATED = {"segment_lengths", "dilation_rates"}
BLOCKS = {
    "pattern_type",
    "block_size",
    "window_size",
    "global_tokens",
    "sparsity_ratio",
}
READS: dict[str, set[str]] = {
    "standard": DILATED,
    "hilbert": DILATED,
    "distributed": DILATED,
    "block_sparse": BLOCKS,
    "hilbert_gpu": DILATED,
    "reference": DILATED,
    "sdpa": DILATED,
    "enterprise": DILATED | {"num_groups"},
    "ring_distributed": DILATED | {"num_groups"},
    "block_sparse_dilated": BLOCKS | DILATED,
    "block_sparse_fixed": BLOCKS | DILATED,
    "block_sparse_hilbert": BLOCKS | DILATED,
    "block_sparse_multihead": BLOCKS | DILATED | {"bias"},
    "block_sparse_distributed": BLOCKS,
}
ONLY_SOME_READ = sorted(set().union(*READS.values()))


def changed(name: str) -> RingAttentionConfig:
    """With what must be given beside the field."""
    beside: dict[str, object] = dict(DILATION) if name in DILATED else {}
    if name in {"global_tokens", "sparsity_ratio"}:
        beside = {"pattern_type": "global_local"}
    if name == "window_size":
        beside = {"block_size": 4}
    return RingAttentionConfig.from_dict(beside | {name: ROWS[name].after})


@pytest.mark.parametrize("preset", READS)
@pytest.mark.parametrize("name", ONLY_SOME_READ)
def test_a_field_that_a_preset_does_not_read_is_refused(preset: str, name: str) -> None:
    found, config = find_preset(preset), changed(name)
    if name in READS[preset]:
        options = found.options(config)
        is_module_field = name == "bias"
        assert (options == found.options()) == is_module_field
        return
    with pytest.raises(OptionError) as caught:
        found.options(config)
    text = str(caught.value)
    assert f"with the preset {preset!r}" in text
    value = getattr(config, name)
    # Of a pair the first is named, and of a block layout its type.
    named = {f"{n}={getattr(config, n)!r}" for n in changed_fields(config)}
    assert caught.value.what.split(" with ")[0] in named
    assert f"{name}={value!r}" in named
    readers = [n for n, reads in READS.items() if name in reads]
    assert all(re.search(rf"\b{n}\b", caught.value.instead) for n in readers)


@pytest.mark.parametrize("preset", READS)
@pytest.mark.parametrize("name", sorted(set(FIELDS) - set(ONLY_SOME_READ)))
def test_a_field_of_how_it_runs_is_read_by_every_preset(preset: str, name: str) -> None:
    row = ROWS[name]
    if name in NOT_BUILT:
        return
    others = {k: v for k, v in row.others.items() if k not in DILATED}
    options = find_preset(preset).options(
        RingAttentionConfig.from_dict({**others, name: row.after})
    )
    if row.option:
        assert options[row.option] == row.value


@pytest.mark.parametrize("pattern_type", ["dilated_sparse", "hierarchical", "adaptive"])
@pytest.mark.parametrize("name", ["sparsity_ratio", "global_tokens"])
def test_a_field_that_a_block_layout_does_not_read_is_refused(
    pattern_type: str, name: str
) -> None:
    config = RingAttentionConfig.from_dict(
        {"pattern_type": pattern_type, name: ROWS[name].after}
    )
    clash = f"{name}=.* with pattern_type='{pattern_type}'"
    with pytest.raises(OptionError, match=clash):
        find_preset("block_sparse").options(config)


# ---- to and from plain data ----------------------------------------------------------


def built_values() -> dict[str, object]:
    """Every field that is built, changed; they need not make sense together."""
    values = {n: row.after for n, row in ROWS.items() if n not in NOT_BUILT}
    del values["sparsity_ratio"]  # clashes with window_size
    return values | {"embed_dim": 32, "num_heads": 8}


@pytest.mark.parametrize(
    "values", [{}, built_values(), {"sparsity_ratio": 0.25}], ids=["none", "all", "one"]
)
def test_a_configuration_survives_json(values: dict[str, object]) -> None:
    config = RingAttentionConfig.from_dict(values)
    text = json.dumps(config.to_dict())
    again = RingAttentionConfig.from_dict(json.loads(text))
    assert again == config
    assert hash(again) == hash(config)
    assert list(json.loads(text)) == list(FIELDS)
    assert RingAttentionConfig.from_params(**values) == config
    assert set(changed_fields(config)) == set(values)


def test_lists_become_tuples() -> None:
    config = RingAttentionConfig.from_params(segment_lengths=[8], dilation_rates=[1])
    assert config.segment_lengths == (8,)
    assert config == RingAttentionConfig(segment_lengths=(8,), dilation_rates=(1,))


def refusal(values: Mapping[str, object]) -> str:
    with pytest.raises(OptionError) as caught:
        RingAttentionConfig.from_dict(values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("segment_length", "segment_lengths"),
        ("dilatation_rates", "dilation_rates"),
        ("block", "block_size"),
        ("n_heads", "num_heads"),
        ("checkpointing", "use_checkpointing"),
    ],
)
def test_an_unknown_field_names_the_nearest(wrong: str, nearest: str) -> None:
    text = refusal({wrong: 1})
    assert f"unknown field {wrong!r}" in text
    assert f"did you mean {nearest!r}?" in text
    with pytest.raises(OptionError, match=f"did you mean '{nearest}'"):
        RingAttentionConfig.from_params(**{wrong: 1})


@pytest.mark.parametrize(
    ("values", "both"),
    [
        (
            {"segment_lengths": (8, 24)},
            ("segment_lengths=(8, 24)", "dilation_rates=None"),
        ),
        ({"dilation_rates": (1, 2)}, ("dilation_rates=(1, 2)", "segment_lengths=None")),
        (
            {"sparsity_ratio": 0.25, "window_size": 16},
            ("sparsity_ratio=0.25", "window_size=16"),
        ),
        ({"embed_dim": 30, "num_heads": 4}, ("embed_dim=30", "num_heads=4")),
        (
            {"checkpoint_frequency": 2},
            ("checkpoint_frequency=2", "use_checkpointing=False"),
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_fields_that_clash_name_both(
    values: dict[str, object], both: tuple[str, str]
) -> None:
    what = refusal(values).splitlines()[0]
    assert all(part in what for part in both)


@pytest.mark.parametrize(
    ("preset", "values", "both"),
    [
        ("enterprise", {**DILATION, "num_groups": 1}, ("num_groups=1", "2 segment_")),
        (
            "sdpa",
            {"segment_lengths": (8, 24, 48), "dilation_rates": (1, 2)},
            ("3 segments", "2 rates"),
        ),
        (
            "block_sparse",
            {"block_size": 16, "window_size": 8},
            ("window=8", "block=16"),
        ),
        (
            "block_sparse_dilated",
            {"pattern_type": "adaptive"},
            ("pattern_type='adaptive'", "dilated attention"),
        ),
        (
            "block_sparse",
            {"hilbert_curve_level": 3},
            ("hilbert_level=3", "layout='auto'"),
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_fields_that_clash_in_a_preset_name_both(
    preset: str, values: dict[str, object], both: tuple[str, str]
) -> None:
    config = RingAttentionConfig.from_dict(values)
    with pytest.raises(OptionError) as caught:
        options_of(preset, config)
    assert all(part in caught.value.what for part in both)


WRONG_VALUES: dict[str, tuple[object, ...]] = {
    "segment_lengths": (8, "8", (0,), (8.0,)),
    "dilation_rates": (1, (0,), (-1,)),
    "num_groups": (0, 1.5, True),
    "pattern_type": ("spiral", 3),
    "block_size": (0, 2.0, "64"),
    "window_size": (0, -4, "64"),
    "global_tokens": (-1, 1.5),
    "sparsity_ratio": (0.0, 1.5, "0.5", True),
    "use_hilbert": ("no",),
    "hilbert_curve_level": (-1, 1.5),
    "dropout": (-0.1, 1.0, "0.1"),
    "embed_dim": (0, "16"),
    "num_heads": (0, 2.5),
    "bias": ("no",),
    "ring_size": (0, "2"),
    "communication_backend": ("nccl", None),
    "overlap_communication": ("no",),
    "use_fused_kernels": ("no",),
    "compile_mode": ("fastest", 3),
    "use_checkpointing": ("no",),
    "checkpoint_frequency": (0, 1.5),
    "validate_gradients": ("no",),
    "watchdog_timeout": (0.0, -1.0, "5"),
}


def test_wrong_values_are_listed_for_every_built_field() -> None:
    assert set(WRONG_VALUES) == set(FIELDS) - set(NOT_BUILT)


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in WRONG_VALUES.items() for v in values]
)
def test_a_wrong_value_is_refused(name: str, value: object) -> None:
    """By the configuration, or where a module is made of it."""
    row = ROWS[name]
    others: dict[str, object] = {"use_checkpointing": True, "use_hilbert": True}
    others |= {k: v for k, v in row.others.items() if k != name}
    others.pop(name, None)
    if row.preset == MULTIHEAD:
        others = WIDE | others
    with pytest.raises(OptionError):
        create_ring_attention(
            row.preset, RingAttentionConfig.from_dict({**others, name: value})
        )


# ---- the three named constructors ----------------------------------------------------

NAMED: dict[str, dict[str, object]] = {
    "development": {"use_fused_kernels": False, "validate_gradients": True},
    "production": {"watchdog_timeout": 120.0},
    "large_scale": {"use_checkpointing": True, "watchdog_timeout": 1800.0},
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_configuration_differs_in_what_it_says(name: str) -> None:
    make = getattr(RingAttentionConfig, name)
    config = make()
    assert {n: getattr(config, n) for n in changed_fields(config)} == NAMED[name]
    given = make(**DILATION, **{n: FIELDS[n] for n in NAMED[name]})
    assert given == RingAttentionConfig.from_dict(DILATION)  # the user's word counts
    with pytest.raises(OptionError, match="did you mean 'num_heads'"):
        make(numheads=4)


def test_development_runs_plain_operators_and_watches_gradients() -> None:
    config = RingAttentionConfig.development()
    assert options_of("standard", config).kernel == "math"
    with pytest.raises(RingCompileError, match="not finite"):
        run_eagerly(runner_of("standard", config), torch.sqrt, 0.0)


def test_production_tells_of_late_peers_sooner() -> None:
    usual = options_of("standard", RingAttentionConfig())
    options = options_of("standard", RingAttentionConfig.production())
    assert options.kernel == "auto"
    assert options.timeout_s < usual.timeout_s


def test_large_scale_computes_attention_again() -> None:
    assert count_runs("standard", RingAttentionConfig.large_scale(), 0) == 2


def test_every_preset_takes_each_named_configuration() -> None:
    for preset in presets():
        for name in NAMED:
            options_of(preset, getattr(RingAttentionConfig, name)())
