"""The presets are the list of SEMANTICS.md section 6, by every name it gives."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringcompile import OptionError, explain
from ringcompile.config import RingOptions
from ringcompile.patterns import LongNet
from ringcompile.preset import (
    RingAttentionConfig,
    find_preset,
    pick_preset,
    presets,
    read_options,
)

# Number, name, class names: copied from the list.
LIST = [
    (
        *(1, "standard", "StandardRingAttention"),
        *("RingDilatedAttention", "RingDilatedAttentionProduction"),
    ),
    (2, "hilbert", "HilbertRingAttention"),
    (3, "distributed", "DistributedRingAttention"),
    (4, "block_sparse", "BlockSparseRingAttention"),
    (5, "hilbert_gpu", "RingDilatedAttentionHilbertGPUOptimized"),
    (6, "reference", "RingDilatedAttentionCorrect", "RingAttentionWrapper"),
    (7, "sdpa", "RingDilatedAttentionSDPA"),
    (8, "enterprise", "EnterpriseDistributedDilatedAttention"),
    (9, "ring_distributed", "RingDistributedDilatedAttention"),
    (10, "block_sparse_dilated", "BlockSparseRingDilatedAttention"),
    (11, "block_sparse_fixed", "BlockSparseRingDilatedAttentionFixed"),
    (
        *(12, "block_sparse_hilbert"),
        "BlockSparseRingDilatedAttentionHilbertPostPattern",
    ),
    (13, "block_sparse_multihead", "BlockSparseRingMultiheadDilatedAttention"),
    (14, "block_sparse_distributed", "BlockSparseRingDistributedDilatedAttention"),
]
NAMES = [str(row[1]) for row in LIST]
ALIASES = {str(alias): str(row[1]) for row in LIST for alias in row[2:]}
SEGMENTS: dict[str, object] = {"segment_lengths": (8, 24), "dilation_rates": (1, 2)}


def test_the_presets_are_those_of_the_list_in_order() -> None:
    assert [row[0] for row in LIST] == [*range(1, 15)]
    assert list(presets()) == NAMES
    assert {p.name: p for p in presets().values()} == presets()


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_a_class_name_finds_its_preset(alias: str, name: str) -> None:
    assert find_preset(alias) is presets()[name]
    assert pick_preset(alias) == (presets()[name], "")
    assert read_options({"attention": alias}) == read_options({"attention": name})


def test_there_are_no_other_class_names() -> None:
    assert {a for p in presets().values() for a in p.aliases} == set(ALIASES)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("standrd", "standard"),
        ("hilbert-gpu", "hilbert_gpu"),
        ("block_sparse_dilate", "block_sparse_dilated"),
        ("StandardRing", "StandardRingAttention"),
        ("Enterprise", "enterprise"),
        ("", "standard"),
    ],
)
def test_an_unknown_name_names_the_nearest(wrong: str, nearest: str) -> None:
    for read in (find_preset, lambda name: read_options({"attention": name})):
        with pytest.raises(OptionError) as caught:
            read(wrong)
        text = str(caught.value)
        assert f"attention={wrong!r}" in text
        assert f"did you mean {nearest!r}?" in text
        assert all(name in text for name in (*NAMES, "auto"))


# ---- which presets are equal ---------------------------------------------------------

# SEMANTICS.md: 3 is 1 with services, 9 is 8 over the ring, 11 is 10 through the one
# configuration, 13 is 10 as a module; 1 with segments and 7 are both 2A. And where a
# configuration names what makes the difference: 14 is 4 of its layout, 2 is 1 laid
# along a curve.
SERVICES = {"standard", "distributed"}
RING = {"enterprise", "ring_distributed"}
ONE_CONFIG = {"block_sparse_dilated", "block_sparse_fixed", "block_sparse_multihead"}
EQUAL: list[tuple[Mapping[str, object], list[set[str]]]] = [
    ({}, [SERVICES, RING, ONE_CONFIG]),
    (SEGMENTS, [SERVICES | {"sdpa"}, RING, ONE_CONFIG]),
    ({"block_size": 4}, [ONE_CONFIG]),
    ({"pattern_type": "hierarchical"}, [{"block_sparse", NAMES[13]}, ONE_CONFIG]),
    ({"num_groups": 4}, [RING]),
    ({"use_hilbert": True}, [SERVICES | {"hilbert"}, RING, ONE_CONFIG]),
    (SEGMENTS | {"use_fused_kernels": False}, [SERVICES | {"sdpa"}, RING, ONE_CONFIG]),
]


@pytest.mark.parametrize(("values", "groups"), EQUAL, ids=lambda v: str([*v]))
def test_presets_are_equal_only_where_the_list_says_so(
    values: Mapping[str, object], groups: list[set[str]]
) -> None:
    config = RingAttentionConfig.from_dict(values)
    by_options: dict[RingOptions, set[str]] = {}
    for name, preset in presets().items():
        try:
            options = read_options(preset.options(config))
        except OptionError:
            assert set(values) - preset.reads
            continue
        by_options.setdefault(options, set()).add(name)
    assert [names for names in by_options.values() if len(names) > 1] == groups


# ---- by name in the options ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_the_presets_options(name: str) -> None:
    expected = RingOptions.from_user(presets()[name].options())
    assert read_options({"attention": name}) == expected
    more = read_options({"attention": name, "timeout_s": 7.0, "unsupported": "error"})
    assert more.timeout_s == 7.0
    assert more.unsupported == "error"
    assert more.attention == expected.attention


def test_auto_stands_for_what_it_picks() -> None:
    assert read_options({"attention": "auto"}) == read_options(
        {"attention": "standard"}
    )


def test_exact_is_no_preset() -> None:
    assert read_options({"attention": "exact"}) == RingOptions()
    with pytest.raises(OptionError, match="neither 'exact' nor a preset"):
        find_preset("exact")


CONTRADICTIONS = [
    ("hilbert", "layout", "zigzag", "hilbert"),
    ("hilbert_gpu", "layout", "contiguous", "hilbert"),
    ("reference", "kernel", "flash", "math"),
    ("block_sparse_hilbert", "block_order", "natural", "hilbert"),
]


@pytest.mark.parametrize(("preset", "option", "value", "own"), CONTRADICTIONS)
def test_an_option_that_contradicts_the_preset_is_refused(
    preset: str, option: str, value: str, own: str
) -> None:
    with pytest.raises(OptionError) as caught:
        read_options({"attention": preset, option: value})
    text = str(caught.value)
    assert f"{option}={value!r} with attention={preset!r}" in text
    assert f"has {option}={own!r}" in text
    agreed = read_options({"attention": preset, option: own})
    assert agreed == read_options({"attention": preset})


def test_an_option_left_to_the_preset_is_the_presets() -> None:
    options = read_options({"attention": "hilbert", "layout": "auto"})
    assert options.layout == "hilbert"
    level = read_options({"attention": "hilbert", "hilbert_level": 5})
    assert level.hilbert_level == 5


def test_an_option_that_the_preset_leaves_open_is_the_users() -> None:
    options = read_options({"attention": "sdpa", "layout": "zigzag", "kernel": "math"})
    assert (options.layout, options.kernel) == ("zigzag", "math")


WHOLE_MODEL = [name for name, *_ in CONTRADICTIONS]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_for_some_modules_is_nothing_but_a_pattern(name: str) -> None:
    given = {"layers.0.*": name, "*": "exact"}
    if name in WHOLE_MODEL:
        with pytest.raises(OptionError, match=r"(?s)'layers\.0\.\*'.*whole model"):
            read_options({"attention": given})
        return
    options = read_options({"attention": given})
    pattern = presets()[name].options()["attention"]
    assert options.attention_globs == (("layers.0.*", pattern), ("*", "exact"))


def test_presets_and_patterns_mix_over_modules() -> None:
    own = LongNet((8,), (2,))
    given = {"a.*": own, "b.*": "auto", "*": "RingDilatedAttentionSDPA"}
    options = read_options({"attention": given})
    sdpa = presets()["sdpa"].options()["attention"]
    assert options.attention_globs == (("a.*", own), ("b.*", "exact"), ("*", sdpa))
    with pytest.raises(OptionError, match="did you mean 'standard'"):
        read_options({"attention": {"*": "standart"}})


# ---- what explain tells --------------------------------------------------------------


def attend(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q.sin(), q.cos(), is_causal=True)


def notes_of(attention: object, world_size: int = 2) -> tuple[str, ...]:
    q = torch.zeros(1, 4, 16, 8)
    report = explain(attend, q, world_size=world_size, options={"attention": attention})
    (found,) = report.attentions
    assert found.status == "ring"
    assert all(f"note: {note}" in str(report) for note in report.notes)
    return report.notes


SERVICES_OFF = {
    "distributed": "ZeRO, gradient compression, monitoring, error recovery",
    "enterprise": "error recovery, memory pool, gradient compression",
    "ring_distributed": "error recovery, memory pool, gradient compression",
    "block_sparse_distributed": (
        "ZeRO, gradient compression, monitoring, error recovery"
    ),
}


@pytest.mark.parametrize(("name", "services"), SERVICES_OFF.items())
def test_explain_tells_which_services_are_off(name: str, services: str) -> None:
    note = f"preset {name}: not built yet, and off: {services}"
    assert notes_of(name) == (note,)
    assert presets()[name].note() == note


def test_explain_tells_it_of_presets_for_some_modules() -> None:
    assert notes_of({"none.*": "sdpa", "*": "distributed"})[0].startswith(
        "preset distributed: not built yet"
    )


def test_presets_without_services_leave_nothing_out() -> None:
    for name in set(NAMES) - set(SERVICES_OFF):
        assert presets()[name].note() == ""
    assert notes_of("sdpa") == ()


def test_explain_tells_why_auto_picked() -> None:
    assert notes_of("auto") == (
        "attention='auto' is standard: nothing sparse is given: exact",
    )
    chosen, left_out = notes_of("auto", world_size=16)
    assert chosen == (
        "attention='auto' is distributed: nothing sparse is given, and the ranks fill "
        "several hosts"
    )
    assert left_out == presets()["distributed"].note()
