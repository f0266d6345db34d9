import math

import pytest
import torch
from support.tolerances import (
    assert_gradients_equal,
    assert_no_worse_than_one_rank,
    assert_output_equal,
)

X64 = torch.tensor([1.0, -4.0], dtype=torch.float64)


def test_outputs_are_relative_to_the_largest_value() -> None:
    assert_output_equal(X64.float() + 3.9e-5, X64)
    with pytest.raises(AssertionError, match="loss: error"):
        assert_output_equal(X64 + 4.1e-5, X64, "loss")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_never_equal(bad: float) -> None:
    wrong = torch.tensor([1.0, bad])
    with pytest.raises(AssertionError):
        assert_output_equal(wrong, X64)
    with pytest.raises(AssertionError):
        assert_gradients_equal({"w": wrong}, {"w": X64})
    with pytest.raises(AssertionError):
        assert_no_worse_than_one_rank(wrong, X64 + 1, X64)


def test_a_gradient_that_is_zero_is_measured_by_the_model() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    want = {"w": X64, "key.bias": zero}
    assert_gradients_equal({"w": X64.float(), "key.bias": zero + 3.9e-7}, want)
    with pytest.raises(AssertionError, match=r"1 of 2 .*\n  key.bias: error"):
        assert_gradients_equal({"w": X64, "key.bias": zero + 4.1e-7}, want)


def test_missing_gradients_are_told() -> None:
    assert_gradients_equal({"w": None}, {"w": None})
    with pytest.raises(AssertionError, match="w: got none, want a"):
        assert_gradients_equal({"w": None}, {"w": X64})
    with pytest.raises(AssertionError, match="other names"):
        assert_gradients_equal({"v": X64}, {"w": X64})


def test_low_precision_may_be_twice_as_wrong_as_one_rank() -> None:
    one = X64 + 0.01
    assert_no_worse_than_one_rank(X64 - 0.0199, one, X64)
    with pytest.raises(AssertionError, match="that of one rank"):
        assert_no_worse_than_one_rank(X64 - 0.0201, one, X64)


def test_shapes_and_the_reference_dtype_are_checked() -> None:
    with pytest.raises(AssertionError, match=r"\(1,\) != \(2,\)"):
        assert_output_equal(X64[:1], X64)
    with pytest.raises(AssertionError, match=r"reference is torch\.float32"):
        assert_output_equal(X64, X64.float())
