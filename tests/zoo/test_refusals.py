"""What can't be cut runs gathered, exactly, with a warning that names the user's line."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankError, RankPool
from support.tolerances import assert_output_equal
from torch import Tensor
from torch.distributed import ProcessGroup

BATCH, HEADS, LENGTH, WIDTH = 2, 2, 12, 4


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, LENGTH, HEADS * WIDTH, generator=generator).to(dtype)
    bias = torch.randn(LENGTH, LENGTH, generator=generator).to(dtype)
    return x.requires_grad_(), bias


def _heads(x: Tensor) -> Tensor:
    heads: Tensor = x.unflatten(-1, (HEADS, WIDTH))
    return heads.transpose(1, 2)


def _attend(x: Tensor) -> Tensor:
    q = _heads(x)
    out = F.scaled_dot_product_attention(q, q.sin(), q.cos(), is_causal=True)
    return out.transpose(1, 2).flatten(2)


def weights_returned(x: Tensor, bias: Tensor) -> Tensor:
    q = _heads(_attend(x))
    weights = (q @ q.transpose(2, 3)).softmax(-1)
    out = weights @ q  # refused
    return out + weights.amax(-1, keepdim=True)


def mask_from_activations(x: Tensor, bias: Tensor) -> Tensor:
    q = _heads(_attend(x))
    keep = (x @ x.transpose(1, 2)).abs() >= 0.1
    return F.scaled_dot_product_attention(q, q, q, attn_mask=keep[:, None])  # refused


def cumulative_sum(x: Tensor, bias: Tensor) -> Tensor:
    return _attend(x).cumsum(1) * 2  # refused


def convolution(x: Tensor, bias: Tensor) -> Tensor:
    kernel = torch.ones(HEADS * WIDTH, 1, 3, dtype=x.dtype)
    y = _attend(x).transpose(1, 2)
    return F.conv1d(y, kernel, padding=1, groups=HEADS * WIDTH)  # refused


def reversal(x: Tensor, bias: Tensor) -> Tensor:
    return _attend(x).flip(1) * 2  # refused


def fourier(x: Tensor, bias: Tensor) -> Tensor:
    spectrum: Tensor = torch.fft.fft(_attend(x), dim=1)  # refused
    return spectrum.real


def single_key(x: Tensor, bias: Tensor) -> Tensor:
    q = _heads(_attend(x))
    return F.scaled_dot_product_attention(q, q[:, :, :1], q[:, :, :1])  # refused


def largest_tokens(x: Tensor, bias: Tensor) -> Tensor:
    return _attend(x).topk(3, dim=1)[0] * 2  # refused


CASES = [
    weights_returned,
    mask_from_activations,
    cumulative_sum,
    convolution,
    reversal,
    fourier,
    single_key,
    largest_tokens,
]


def _refused_line(fn: Callable[..., Tensor]) -> str:
    lines, first = inspect.getsourcelines(fn)
    number = next(i for i, text in enumerate(lines) if "# refused" in text)
    return f"{__file__}:{first + number}"


class Reverse(torch.autograd.Function):
    """Turns the gradient round: its backward is not that of its forward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return -3 * grads[0]


def reverse_gradient(x: Tensor, bias: Tensor) -> Tensor:
    y = _attend(x)
    reverse: Callable[[Tensor], Tensor] = Reverse.apply
    return y + reverse(y)


def run_reversed(group: ProcessGroup, rank: int, unsupported: str) -> list[str]:
    options = {"unsupported": unsupported}
    call, _ = compile_ring(
        reverse_gradient, group, compiler="aot_eager", options=options
    )
    x, bias = _inputs(torch.float32)
    x64, bias64 = _inputs(torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = call(x, bias)
    (dx,) = torch.autograd.grad(got.sin().sum(), x)
    want = reverse_gradient(x64, bias64)
    (dx64,) = torch.autograd.grad(want.sin().sum(), x64)
    assert_output_equal(got, want)
    assert_output_equal(dx, dx64, "gradient")
    return [str(w.message) for w in caught if "runs whole" in str(w.message)]


def test_a_backward_of_the_users_own_is_never_lost(ranks: RankPool) -> None:
    for texts in ranks.run(run_reversed, "gather"):
        assert len(texts) == 1
        assert "autograd_function_apply" in texts[0]
    with pytest.raises(RankError, match="UnsupportedAttentionError"):
        ranks.run(run_reversed, "error")


def run_case(group: ProcessGroup, rank: int, name: str, unsupported: str) -> list[str]:
    """The texts of the warnings, after the result was found right."""
    fn = globals()[name]
    options: dict[str, Any] = {"unsupported": unsupported}
    call, record = compile_ring(fn, group, compiler="eager", options=options)
    # Random numbers are drawn alike in one dtype only.
    exact = torch.float32 if "dropout" in name else torch.float64
    x, x_exact = _inputs(torch.float32), _inputs(exact)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(5)
        got = call(*x)
    torch.manual_seed(5)
    want = fn(*x_exact)
    assert record.num_graphs == 1
    assert len(record.rings) == 1
    assert_output_equal(got, want.double())
    (dx,) = torch.autograd.grad(got.sin().sum(), x[0])
    (dx_exact,) = torch.autograd.grad(want.sin().sum(), x_exact[0])
    assert_output_equal(dx, dx_exact.double(), "gradient")
    return [str(w.message) for w in caught if "gather" in str(w.message)]


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_a_refused_op_is_gathered_exactly_with_one_warning(
    ranks: RankPool, fn: Callable[..., Tensor]
) -> None:
    num_refused = 2 if fn is single_key else 1  # a slice, and the attention over it
    for texts in ranks.run(run_case, fn.__name__, "gather"):
        assert len(texts) == num_refused, texts
        assert _refused_line(fn) in texts[0]


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_a_refused_op_is_an_error_where_the_user_wants_that(
    ranks: RankPool, fn: Callable[..., Tensor]
) -> None:
    with pytest.raises(RankError, match="UnsupportedAttentionError") as caught:
        ranks.run(run_case, fn.__name__, "error")
    assert _refused_line(fn) in str(caught.value)
