"""A user's own mask function or table of blocks, and what of them is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from ringcompile.errors import OptionError
from ringcompile.ir.mask import Mask
from ringcompile.patterns import AttentionSpec, Custom

SPEC = AttentionSpec(4, 2, 64)


def no_two_alike(b: Any, h: Any, q: Any, k: Any) -> Any:  # noqa: ANN401
    return (q - k >= 0) & (q // 8 == k // 8) | (q * 2 + h - b) % 3 != k


def with_torch(b: Any, h: Any, q: Any, k: Any) -> Any:  # noqa: ANN401
    return torch.where(q > k, h, b)


def with_and(b: Any, h: Any, q: Any, k: Any) -> Any:  # noqa: ANN401
    return q > k and h > b


def of_products(b: Any, h: Any, q: Any, k: Any) -> Any:  # noqa: ANN401
    return b + h < q * k


def of_nothing(b: Any, h: Any, q: Any, k: Any) -> Any:  # noqa: ANN401
    return b + h + q + k


def refusal(build: Callable[[], object]) -> str:
    with pytest.raises(OptionError) as caught:
        build()
    return str(caught.value)


def test_a_function_is_read_as_its_predicate() -> None:
    def is_close(b: Any, h: Any, q: Any, k: Any) -> Any:  # noqa: ANN401
        del b, h
        return ((q - k).abs() <= 3) & (q >= k)

    with pytest.warns(UserWarning, match="compiles anew"):
        pattern = Custom(is_close)
    assert_expected_inline(str(Mask(pattern.keeps(SPEC))), """k <= q and q <= k + 3""")


def test_a_pattern_of_one_function_or_table_is_one_pattern() -> None:
    on = torch.eye(4, dtype=torch.bool)
    assert Custom(no_two_alike) == Custom(no_two_alike)
    assert Custom(on, 16) == Custom(on.clone(), 16)
    assert hash(Custom(on, 16)) == hash(Custom(on.clone(), 16))
    assert Custom(on, 16) != Custom(~on, 16)


@pytest.mark.parametrize("function", [with_torch, with_and, of_products, of_nothing])
def test_what_can_t_be_read_is_refused(function: Callable[..., object]) -> None:
    text = refusal(lambda: Custom(function).keeps(SPEC))
    assert function.__name__ in text
    assert "test_custom.py" in text


def test_the_texts_of_refusals() -> None:
    assert_expected_inline(
        refusal(lambda: Custom(with_and).keeps(SPEC)),
        """\
mask function with_and
  at: test_custom.py
  because: `and`, `or`, `not`, `if` and chains like a < b < c need one known value
  instead: + - * // % and comparisons of b, h, q, k, joined by & | ~; or a bool tensor of blocks""",
    )
    assert_expected_inline(
        refusal(lambda: Custom(torch.ones(3, 4, dtype=torch.bool), 16).keeps(SPEC)),
        """\
a table of 3 x 4 blocks
  at: Custom
  because: 64 tokens are 4 blocks of 16
  instead: a table of 4 x 4, or another block""",
    )
    assert_expected_inline(
        refusal(lambda: Custom(torch.ones(3, 4, 4, dtype=torch.bool), 16).keeps(SPEC)),
        """\
a table for 3 heads
  at: Custom
  because: the attention has 4 query heads
  instead: a table for 4 heads, or one for all""",
    )
    assert_expected_inline(
        refusal(lambda: Custom(torch.ones(4, 4), 16)),
        """\
a table of torch.float32 (4, 4)
  at: Custom
  because: it says of each block whether it is on
  instead: a bool tensor (nb, nb), or (H, nb, nb) with one table a head""",
    )
    assert_expected_inline(
        refusal(lambda: Custom(3)),  # type: ignore[arg-type]
        """\
3
  at: Custom
  because: it is neither a function of positions nor a tensor of blocks
  instead: mask_mod(b, h, q, k), or a bool tensor (nb, nb)""",
    )
