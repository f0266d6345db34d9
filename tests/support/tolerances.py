"""What counts as equal, against a float64 eager run; the only place with tolerances.

- Gradients: ``max|g - g64| <= max(1e-5 * max|g64|, 1e-7 * largest gradient)``, where
  the largest is over the whole model: a gradient that is 0 in exact arithmetic (BERT's
  ``key.bias``) has no relative error.
- Outputs and loss: ``max|o - o64| <= 1e-5 * max|o64|``.
- bfloat16: error against float64 at most 2x that of the same model on one rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

OUTPUT_RTOL = 1e-5
GRAD_RTOL = 1e-5
GRAD_MODEL_RTOL = 1e-7
LOW_PRECISION_FACTOR = 2.0


def assert_output_equal(got: Tensor, want64: Tensor, name: str = "output") -> None:
    """Require an output or a loss to equal that of the float64 run."""
    error, scale = max_error(got, want64), largest(want64)
    # "not <=" so that a NaN fails.
    if not error <= OUTPUT_RTOL * scale:
        raise AssertionError(
            f"{name}: error {error:.3g} > {OUTPUT_RTOL:g} x {scale:.3g} (largest value)"
        )


def assert_gradients_equal(
    got: Mapping[str, Tensor | None], want64: Mapping[str, Tensor | None]
) -> None:
    """Require every gradient of a model to equal that of the float64 run.

    Args:
        got: Gradient of each parameter by name; None where it has none.
        want64: The same of the float64 run.
    """
    assert set(got) == set(want64), f"other names: {sorted(set(got) ^ set(want64))}"
    top = max((largest(g) for g in want64.values() if g is not None), default=0.0)
    wrong = [
        f"{name}: {text}"
        for name, want in want64.items()
        if (text := _compare_gradient(got[name], want, top))
    ]
    if wrong:
        raise AssertionError(
            "\n  ".join([f"{len(wrong)} of {len(want64)} gradients differ", *wrong])
        )


def _compare_gradient(got: Tensor | None, want: Tensor | None, top: float) -> str:
    if got is None or want is None:
        return "" if got is want else f"got {_kind(got)}, want {_kind(want)}"
    error, scale = max_error(got, want), largest(want)
    allowed = max(GRAD_RTOL * scale, GRAD_MODEL_RTOL * top)
    if error <= allowed:
        return ""
    return f"error {error:.3g} > {allowed:.3g} (largest value {scale:.3g})"


def assert_no_worse_than_one_rank(
    got: Tensor, one_rank: Tensor, want64: Tensor, name: str = "output"
) -> None:
    """Require a low-precision result to be within 2x of one rank's error.

    Args:
        got: From several ranks.
        one_rank: The same model in the same dtype, compiled on one rank.
        want64: The float64 run.
        name: What it is, for the message.
    """
    error, base = max_error(got, want64), max_error(one_rank, want64)
    if not error <= LOW_PRECISION_FACTOR * base:
        raise AssertionError(
            f"{name}: error {error:.3g} > {LOW_PRECISION_FACTOR:g} x {base:.3g}, "
            f"that of one rank (largest value {largest(want64):.3g})"
        )


def max_error(got: Tensor, want64: Tensor) -> float:
    """Largest absolute difference; NaN if ``got`` has one."""
    assert want64.dtype == torch.float64, f"the reference is {want64.dtype}"
    assert got.shape == want64.shape, f"{tuple(got.shape)} != {tuple(want64.shape)}"
    return largest(got.detach().double() - want64.detach())


def largest(x: Tensor) -> float:
    """Largest absolute value; 0 of an empty tensor."""
    return x.detach().abs().max().item() if x.numel() else 0.0


def _kind(x: Tensor | None) -> str:
    return "none" if x is None else f"a {tuple(x.shape)} tensor"
