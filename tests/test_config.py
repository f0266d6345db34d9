import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

from ringcompile.config import Environment, RingOptions, set_up_logging
from ringcompile.errors import OptionError


@dataclass(frozen=True)
class Pattern:
    segments: tuple[int, ...] = (4,)

    def build_parts(self) -> tuple[int, ...]:
        return self.segments


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def build_parts(self) -> tuple[int, ...]:
        return ()


def refusal(options: dict[str, object], mode: str | None = None) -> str:
    with pytest.raises(OptionError) as caught:
        RingOptions.from_user(options, mode)
    return str(caught.value)


def test_defaults_are_those_of_the_design() -> None:
    options = RingOptions.from_user()
    assert options == RingOptions()
    assert_expected_inline(
        str(options),
        """RingOptions(mesh=None, attention='exact', layout='auto', inputs='replicated', outputs='gathered', grads='summed', local_scale='mean', unsupported='gather', kernel='auto', transport='auto', stages='auto', block_order='natural', hilbert_level=None, verify='plan', timeout_s=600.0, inductor=(), mode=None)""",
    )


BUILT: dict[str, object] = {
    "attention": Pattern(),
    "layout": "striped",
    "outputs": "sharded",
    "grads": "local",
    "local_scale": "sum",
    "unsupported": "error",
    "kernel": "math",
    "transport": "p2p",
    "stages": 2,
    "verify": "off",
    "timeout_s": 5,
    "inductor": {"max_autotune": True, "benchmark_kernel": [1]},
}


def test_every_built_option_is_carried() -> None:
    options = RingOptions.from_user(BUILT, "max-autotune")
    for key, value in BUILT.items():
        assert key == "inductor" or getattr(options, key) == value
    assert options.inductor_patches == BUILT["inductor"]
    assert options.mode == "max-autotune"


def test_equal_options_are_equal_and_hash_alike() -> None:
    first, second = RingOptions.from_user(BUILT), RingOptions.from_user(BUILT)
    assert first == second
    assert hash(first) == hash(second)
    assert first != RingOptions.from_user(BUILT | {"inductor": {}})
    assert first != RingOptions.from_user(BUILT | {"layout": "zigzag"})


def test_options_that_hold_a_group_compare_it_by_identity() -> None:
    one, other = object(), object()
    assert RingOptions(mesh=one) == RingOptions(mesh=one)
    assert hash(RingOptions(mesh=one)) == hash(RingOptions(mesh=one))
    assert RingOptions(mesh=one) != RingOptions(mesh=other)


def test_patterns_by_module_stay_in_order_and_hash() -> None:
    given = {"*.0.*": Pattern(), "*": "exact"}
    options = RingOptions.from_user({"attention": given})
    assert options.attention_globs == tuple(given.items())
    assert hash(options) == hash(RingOptions.from_user({"attention": dict(given)}))
    turned = dict(reversed(given.items()))
    assert options != RingOptions.from_user({"attention": turned})
    assert not options.is_exact
    assert RingOptions.from_user({"attention": {"*": "exact"}}).is_exact
    assert RingOptions(attention=Pattern()).attention_globs == (("*", Pattern()),)


def test_a_wrong_pattern_of_a_module_is_named() -> None:
    assert_expected_inline(
        refusal({"attention": {"*.0.*": "exact", "*.1.*": "longnet"}}),
        """\
attention['*.1.*']='longnet'
  at: options
  because: it is neither 'exact' nor a pattern
  instead: 'exact', or a pattern object of ringcompile.patterns""",
    )


@pytest.mark.parametrize("given", [{}, {0: Pattern()}, {"": Pattern()}], ids=str)
def test_a_dict_of_patterns_needs_globs(given: object) -> None:
    assert "a dict gives patterns to globs" in refusal({"attention": given})


def test_a_pattern_of_a_module_must_be_hashable() -> None:
    assert "must be hashable" in refusal({"attention": {"*": Unhashable()}})


def test_unknown_key_names_the_nearest() -> None:
    assert_expected_inline(
        refusal({"layuot": "zigzag"}),
        """\
unknown option 'layuot'
  at: options
  because: the options are mesh, attention, layout, inputs, outputs, grads, local_scale, unsupported, kernel, transport, stages, block_order, hilbert_level, verify, timeout_s, inductor
  instead: did you mean 'layout'?""",
    )


def test_unknown_value_names_the_nearest() -> None:
    assert_expected_inline(
        refusal({"layout": "zig-zag"}),
        """\
layout='zig-zag'
  at: options
  because: layout is 'auto' or 'contiguous' or 'zigzag' or 'striped' or 'hilbert'
  instead: did you mean 'zigzag'?""",
    )


def test_a_value_that_is_not_built_is_refused_by_name() -> None:
    assert_expected_inline(
        refusal({"kernel": "flash"}),
        """\
kernel='flash'
  at: options
  because: not built yet
  instead: 'auto' or 'flex' or 'math'""",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "cudnn"},
        {"kernel": "flash"},
        {"verify": "numeric"},
    ],
    ids=str,
)
def test_later_features_are_refused(options: dict[str, object]) -> None:
    (key,) = options
    text = refusal(options)
    assert text.startswith(key)
    assert "not built yet" in text


@pytest.mark.parametrize(
    "options",
    [
        {"layout": 3},
        {"layout": None},
        {"attention": "exakt"},
        {"attention": "longnet"},
        {"attention": 7},
        {"attention": Unhashable()},
        {"stages": 0},
        {"stages": True},
        {"hilbert_level": 3},
        {"kernel": "flex", "block_order": "hilbert"},
        {"layout": "hilbert", "hilbert_level": -1},
        {"layout": "hilbert", "hilbert_level": True},
        {"stages": "many"},
        {"timeout_s": 0},
        {"timeout_s": "600"},
        {"timeout_s": True},
        {"inductor": [("max_autotune", True)]},
        {"inductor": {1: True}},
        {"local_scale": "mean"},
        {"grads": "local", "local_scale": "median"},
        {"mode": "max-autotune"},
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    text = refusal(options)
    assert list(options)[-1] in text.splitlines()[0]
    assert "instead:" in text


def test_unknown_mode_names_the_nearest() -> None:
    assert "did you mean 'max-autotune'" in refusal({}, "max_autotune")


def test_a_record_built_directly_is_checked_too() -> None:
    with pytest.raises(OptionError, match="flash"):
        RingOptions(kernel="flash")


def test_environment_is_read() -> None:
    found = Environment.read({"RINGCOMPILE_LOG": "Debug", "RINGCOMPILE_DUMP": "out"})
    assert found == Environment(log_level=logging.DEBUG, dump_dir=Path("out"))
    assert Environment.read({"RINGCOMPILE_LOG": ""}) == Environment()
    with pytest.raises(OptionError, match="did you mean 'debug'"):
        Environment.read({"RINGCOMPILE_LOG": "debgu"})


def test_logging_is_set_up_once_and_only_when_asked() -> None:
    logger = logging.getLogger("ringcompile")
    before = logger.level, list(logger.handlers)
    try:
        set_up_logging(Environment())
        assert (logger.level, logger.handlers) == before
        for _ in range(2):
            set_up_logging(Environment(log_level=logging.INFO))
        assert logger.level == logging.INFO
        assert len(logger.handlers) == 1
    finally:
        logger.setLevel(before[0])
        logger.handlers[:] = before[1]


def test_options_do_not_hold_tensors_by_accident() -> None:
    # torch.compile compares options; a tensor there has no truth value.
    assert "tensor" in refusal({"stages": torch.ones(2)})
