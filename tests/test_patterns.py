from collections.abc import Callable

import pytest
from expecttest import assert_expected_inline

from ringcompile.errors import OptionError
from ringcompile.ir.mask import EmptyRow, Mask, causal, conjunction
from ringcompile.patterns import (
    AttentionSpec,
    ConsecutiveDilated,
    GroupedDilated,
    LocalWindow,
    LongNet,
    Pattern,
    PerHead,
)

CAUSAL = Mask(causal(), 0, EmptyRow.MEAN_ALL)


def describe(pattern: Pattern, num_heads: int = 4, num_kv_heads: int = 2) -> str:
    parts = pattern.build_parts(CAUSAL, AttentionSpec(num_heads, num_kv_heads, 64))
    return "\n".join(f"{mask} | {selection}" for mask, selection in parts)


def test_longnet_has_a_part_for_each_rate() -> None:
    assert_expected_inline(
        describe(LongNet((16, 64), (1, 4))),
        """\
k // 16 == q // 16 and k <= q | Selection(segment=16, rate=1, offsets=(0, 0, 0, 0), num_kv_heads=2, start=0, stop=None)
(h - k) % 4 == 0 and k // 64 == q // 64 and k <= q | Selection(segment=64, rate=4, offsets=(0, 1, 2, 3), num_kv_heads=2, start=0, stop=None)""",
    )


def test_offsets_of_one_kv_head_need_no_mask() -> None:
    assert_expected_inline(
        describe(LongNet((64,), (4,), "kv_head"), 8, 2),
        """k // 64 == q // 64 and k <= q | Selection(segment=64, rate=4, offsets=(0, 0, 0, 0, 1, 1, 1, 1), num_kv_heads=2, start=0, stop=None)""",
    )


def test_offsets_of_torchscale_are_runs_of_heads() -> None:
    (_, selection), *_ = LongNet((64,), (3,), "torchscale").build_parts(
        CAUSAL, AttentionSpec(8, 8, 64)
    )
    assert selection is not None
    assert selection.offsets == (0, 0, 0, 1, 1, 1, 2, 2)


def test_a_local_window_is_one_part() -> None:
    assert_expected_inline(
        describe(LocalWindow(256)),
        """k // 64 <= (q // 64) + 2 and k <= q and q // 64 <= (k // 64) + 2 | None""",
    )


@pytest.mark.parametrize("pattern", [LongNet((16, 64), (1, 4)), LocalWindow(128)])
def test_the_users_mask_is_kept_and_empty_rows_are_zero(pattern: Pattern) -> None:
    for mask, _ in pattern.build_parts(CAUSAL, AttentionSpec(4, 2, 64)):
        assert conjunction(mask.keeps, causal()) == mask.keeps
        assert mask.empty_row is EmptyRow.ZERO


def test_patterns_compare_and_hash() -> None:
    assert LongNet([16, 64], [1, 4]) == LongNet((16, 64), (1, 4))  # type: ignore[arg-type]
    assert len({LocalWindow(128), LocalWindow(128, 64), LocalWindow(64)}) == 2


def refuse(make: Callable[[], object]) -> str:
    with pytest.raises(OptionError) as caught:
        make()
    return str(caught.value)


def test_what_clashes_is_named_with_two_ways_out() -> None:
    refused = [
        refuse(lambda: LongNet((16, 64), (1,))),
        refuse(lambda: GroupedDilated((16,), (1, 2, 4))),
        refuse(lambda: ConsecutiveDilated((), ())),
        refuse(lambda: LongNet((16, 0), (1, 2))),
        refuse(lambda: LongNet((16.0,), (2,))),  # type: ignore[arg-type]
        refuse(lambda: LongNet(16, 2)),  # type: ignore[arg-type]
        refuse(lambda: LongNet((16,), (2,), weights="loose")),
        refuse(lambda: LongNet((16,), (2,), offset="seed")),
        refuse(lambda: PerHead(())),
    ]
    assert_expected_inline(
        "\n".join(refused),
        """\
2 segments with 1 rates
  at: LongNet
  because: each segment length has one rate
  instead: 1 more in rates, or 1 fewer in segments
1 segments with 3 rates
  at: GroupedDilated
  because: each segment length has one rate
  instead: 2 more in segments, or 2 fewer in rates
0 segments with 0 rates
  at: ConsecutiveDilated
  because: a dilated pattern has 1 segment length or more, not 0
  instead: a segment length and its rate, or attention='exact'
segments[1]=0
  at: LongNet
  because: it counts tokens, blocks or heads, of which 1 is the least
  instead: segments[1]=1 or more, or "exact" in place of the pattern
segments=16.0
  at: LongNet
  because: it counts tokens, blocks or heads, in whole numbers
  instead: segments=1 or more, or "exact" in place of the pattern
segments=16
  at: LongNet
  because: there may be several
  instead: a tuple or a list: segments=(16,)
weights='loose'
  at: LongNet
  because: there is no such rule
  instead: weights='joint' or weights='detached'
offset='seed'
  at: LongNet
  because: there is no such rule
  instead: offset='paper' or offset='torchscale' or offset='kv_head'
0 patterns for 1 head or more
  at: PerHead
  because: every head has one
  instead: one pattern or more, or "exact" without PerHead""",
    )


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda: LongNet((16, 64), (1,)), "2 segments with 1 rates"),
        (lambda: LongNet((), ()), "0 segments with 0 rates"),
        (lambda: LongNet((16, 0), (1, 2)), r"segments\[1\]=0"),
        (lambda: LongNet((16,), (-2,)), "rates=-2"),
        (lambda: LongNet((16,), (2,), offset="seed"), "offset='seed'"),
        (lambda: LongNet((16,), (2,), weights="loose"), "no such rule"),
    ],
)
def test_clashes_are_named(make: object, numbers: str) -> None:
    assert callable(make)
    with pytest.raises(OptionError, match=numbers):
        make()
