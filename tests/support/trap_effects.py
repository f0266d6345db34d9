"""Traps of writes in place, of aliases, and of values and dtypes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.traps import (
    SCALE,
    B,
    E,
    S,
    Seen,
    Setting,
    attend,
    merge,
    run_step,
    split,
)

# ---- writes in place and aliases -----------------------------------------------------


def write_on_a_view_of_features(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        y = attend(x)
        y[:, :, 0].mul_(2)
        return y * 3

    return s.step(fn, s.tokens())


def write_on_one_token(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        y = attend(x) + 1
        y[:, 0] = 0
        return y * 3

    return s.step(fn, s.tokens())


def write_on_some_tokens(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        y = attend(x).clone()
        y[:, 3:7].add_(1)
        y[:, torch.tensor([1, 10])] = 5.0
        return y * 3

    return s.step(fn, s.tokens())


def write_on_keys(s: Setting) -> Seen:
    """Static caches are written so."""

    def fn(x: Tensor) -> Tensor:
        q = split(attend(x))
        keys = torch.zeros_like(q)
        keys[:, :, torch.arange(S)] = q.sin()
        return merge(F.scaled_dot_product_attention(q, keys, keys, is_causal=True))

    return s.step(fn, s.tokens())


def residual_in_place(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        x = x * 1.5
        x += attend(x * 2)
        x += attend(x * 2)
        return x

    return s.step(fn, s.tokens())


def write_on_the_input(s: Setting) -> Seen:
    x = s.tokens()

    def fn(x: Tensor) -> Tensor:
        y = attend(x)
        x.add_(y.detach())
        return y + x

    with torch.no_grad():
        y = s.compile(fn)(x)
    return {"y": y, "x": x}


def write_on_a_buffer(s: Setting) -> Seen:
    class Model(nn.Module):
        mean: Tensor
        last: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(E))
            self.register_buffer("last", torch.zeros(B, S, E))

        def forward(self, x: Tensor) -> Tensor:
            y = attend(x)
            self.mean.lerp_(y.detach().mean((0, 1)).to(self.mean.dtype), 0.1)
            self.last.copy_(y.detach())
            return y * 2

    model = Model()
    call = s.compile(model)
    run_step(call, s.tokens())
    seen = run_step(call, s.tokens(seed=2))
    return seen | {"mean": model.mean, "last": model.last}


def batch_norm(s: Setting) -> Seen:
    norm = nn.BatchNorm1d(E).to(s.dtype)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(attend(x).transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]

    seen = run_step(s.compile(Model()), s.tokens())
    return seen | {"mean": norm.running_mean, "var": norm.running_var}


def input_is_returned(s: Setting) -> Seen:
    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attend(x), x, x[:, 2:5]

    return s.step(fn, s.tokens())


def outputs_share_memory(s: Setting) -> Seen:
    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = attend(x)
        return y, y.transpose(0, 1), y[:, 0]

    return s.step(fn, s.tokens())


def outputs_that_are_no_tensors(s: Setting) -> Seen:
    def fn(x: Tensor) -> tuple[Tensor, int, None, tuple[int, ...], Tensor]:
        y = attend(x)
        return y, y.shape[1], None, tuple(y.shape), torch.tensor(y.shape[1])

    seen = s.step(fn, s.tokens())
    out = s.compile(fn)(s.tokens())
    return seen | {"sizes": torch.tensor([out[1], *out[3]])}


def sparse_slices(s: Setting) -> Seen:
    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = attend(x)
        index = torch.tensor([[3], [7]]).unsqueeze(-1).expand(B, 1, E)
        return y[:, ::3], y[:, -2], y.gather(1, index), y[:, [0, 5, 5]]

    return s.step(fn, s.tokens())


# ---- values and dtypes ---------------------------------------------------------------


def complex_numbers(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        z = torch.complex(x, x.sin())
        y = attend(x)
        return torch.fft.fft(z, dim=-1).abs() + y * z.angle()  # type: ignore[no-any-return]

    return s.step(fn, s.tokens())


def complex_scores(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        z = torch.complex(q, q.sin())
        scores = (z @ z.mT).real * SCALE
        return merge(scores.softmax(-1) @ q)

    return s.step(fn, s.tokens())


def nan_in_the_input(s: Setting) -> Seen:
    x = s.tokens()
    x[1, 5] = math.nan
    return s.step(lambda x: attend(x) * 2, x)


def infinity_in_the_input(s: Setting) -> Seen:
    x = s.tokens()
    x[0, 7, 3] = math.inf

    def fn(x: Tensor) -> Tensor:
        q = split(x)
        return merge(F.scaled_dot_product_attention(q, q, q))

    return s.step(fn, x)


def nan_behind_the_mask(s: Setting) -> Seen:
    """What a hidden NaN gives is a kernel's own matter; all else is as without it."""
    x = s.tokens()
    x[1, 9] = math.nan
    kept = torch.arange(S) < torch.tensor([[S], [8]])
    return s.step(lambda x, m: attend(x, m[:, None, None]), x, kept)


def large_scores(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x * 100)
        scores = q @ q.mT
        mask = (1 - torch.ones(S, S).tril()) * -10000.0
        return merge((scores + mask.to(x.dtype)).softmax(-1) @ q)

    return s.step(fn, s.tokens())


def exp_of_large_scores(s: Setting) -> Seen:
    """Without the maximum taken off, eager float32 overflows; float64 does not yet."""

    def fn(x: Tensor) -> Tensor:
        q = split(x * 3)
        e = (q @ q.mT).exp()
        return merge(e / e.sum(-1, keepdim=True) @ q)

    return s.step(fn, s.tokens())


def numbers_of_two_dtypes(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        scores = (q.double() @ q.double().mT * SCALE).softmax(-1)
        return merge(scores.to(x.dtype) @ q)

    return s.step(fn, s.tokens())


def nested_autocast(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = attend(F.linear(x, torch.eye(E, dtype=x.dtype)))
            with torch.autocast("cpu", enabled=False):
                z = attend(y.to(x.dtype))
            return F.linear(z, torch.eye(E, dtype=x.dtype)).to(x.dtype)

    return s.step(fn, s.tokens())


def autocast_round_the_call(s: Setting) -> Seen:
    call = s.compile(lambda x: attend(x @ torch.eye(E, dtype=x.dtype)).to(x.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return run_step(call, s.tokens())


def transposed_input(s: Setting) -> Seen:
    x = s.tokens(S, E, B).permute(2, 0, 1).detach()
    return s.step(lambda x: attend(x) * 2, x)


def expanded_input(s: Setting) -> Seen:
    base = s.tokens(1, S, E).requires_grad_()
    return s.step(lambda x: attend(x.expand(B, S, E)) * 2, base)


def input_with_steps(s: Setting) -> Seen:
    x = s.tokens(B, 2 * S, E)[:, ::2].detach()
    return s.step(lambda x: attend(x) * 2, x)


def noise_is_added(s: Setting) -> Seen:
    """The same noise on every rank, which is eager's, drawn in one dtype."""

    def fn(x: Tensor) -> Tensor:
        return attend(x + torch.randn(x.shape).to(x.dtype)) * 2

    return s.step(fn, s.tokens())


TRAPS = (
    write_on_a_view_of_features,
    write_on_one_token,
    write_on_some_tokens,
    write_on_keys,
    residual_in_place,
    write_on_the_input,
    write_on_a_buffer,
    batch_norm,
    input_is_returned,
    outputs_share_memory,
    outputs_that_are_no_tensors,
    sparse_slices,
    complex_numbers,
    complex_scores,
    nan_in_the_input,
    infinity_in_the_input,
    nan_behind_the_mask,
    large_scores,
    exp_of_large_scores,
    numbers_of_two_dtypes,
    transposed_input,
    expanded_input,
    input_with_steps,
    noise_is_added,
)
LOW_PRECISION = (
    nested_autocast,
    autocast_round_the_call,
)
