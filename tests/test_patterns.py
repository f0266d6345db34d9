import pytest
from expecttest import assert_expected_inline

from ringcompile.errors import OptionError
from ringcompile.ir.mask import EmptyRow, Mask, causal, conjunction
from ringcompile.patterns import LocalWindow, LongNet, Pattern

CAUSAL = Mask(causal(), 0, EmptyRow.MEAN_ALL)


def describe(pattern: Pattern, num_heads: int = 4, num_kv_heads: int = 2) -> str:
    parts = pattern.build_parts(CAUSAL, num_heads, num_kv_heads)
    return "\n".join(f"{mask} | {selection}" for mask, selection in parts)


def test_longnet_has_a_part_for_each_rate() -> None:
    assert_expected_inline(
        describe(LongNet((16, 64), (1, 4))),
        """\
k // 16 == q // 16 and k <= q | None
(h - k) % 4 == 0 and k // 64 == q // 64 and k <= q | Selection(segment=64, rate=4, offsets=(0, 1, 2, 3), num_kv_heads=2)""",
    )


def test_offsets_of_one_kv_head_need_no_mask() -> None:
    assert_expected_inline(
        describe(LongNet((64,), (4,), "kv_head"), 8, 2),
        """k // 64 == q // 64 and k <= q | Selection(segment=64, rate=4, offsets=(0, 0, 0, 0, 1, 1, 1, 1), num_kv_heads=2)""",
    )


def test_offsets_of_torchscale_are_runs_of_heads() -> None:
    (_, selection), *_ = LongNet((64,), (3,), "torchscale").build_parts(CAUSAL, 8, 8)
    assert selection is not None
    assert selection.offsets == (0, 0, 0, 1, 1, 1, 2, 2)


def test_a_local_window_is_one_part() -> None:
    assert_expected_inline(
        describe(LocalWindow(256)),
        """k // 64 <= (q // 64) + 2 and k <= q and q // 64 <= (k // 64) + 2 | None""",
    )


@pytest.mark.parametrize("pattern", [LongNet((16, 64), (1, 4)), LocalWindow(128)])
def test_the_users_mask_is_kept_and_empty_rows_are_zero(pattern: Pattern) -> None:
    for mask, _ in pattern.build_parts(CAUSAL, 4, 2):
        assert conjunction(mask.keeps, causal()) == mask.keeps
        assert mask.empty_row is EmptyRow.ZERO


def test_patterns_compare_and_hash() -> None:
    assert LongNet([16, 64], [1, 4]) == LongNet((16, 64), (1, 4))  # type: ignore[arg-type]
    assert len({LocalWindow(128), LocalWindow(128, 64), LocalWindow(64)}) == 2


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda: LongNet((16, 64), (1,)), "2 segments with 1 rates"),
        (lambda: LongNet((), ()), "0 segments with 0 rates"),
        (lambda: LongNet((16, 0), (1, 2)), r"segments\[1\]=0"),
        (lambda: LongNet((16,), (-2,)), "rates=-2"),
        (lambda: LongNet((16,), (2,), offset="seed"), "offset='seed'"),
        (lambda: LongNet((16,), (2,), weights="detached"), "not built yet"),
        (lambda: LongNet((16,), (2,), weights="loose"), "no such rule"),
        (lambda: LocalWindow(32), "window=32 with block=64"),
        (lambda: LocalWindow(64, 0), "block=0"),
    ],
)
def test_clashes_are_named(make: object, numbers: str) -> None:
    assert callable(make)
    with pytest.raises(OptionError, match=numbers):
        make()
