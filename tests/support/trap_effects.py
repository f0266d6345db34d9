"""Traps of writes in place, aliases, dtypes, gradients, hooks, and ranks that differ."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
        y = attend(x)
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
        x += attend(x)
        x += attend(x)
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
        return torch.fft.fft(z, dim=-1).abs() + y * z.angle()

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
        return merge(F.scaled_dot_product_attention(q, q, q, is_causal=True))

    return s.step(fn, x)


def nan_behind_the_mask(s: Setting) -> Seen:
    """0 times NaN is NaN: a hidden key's value is not nothing in eager."""
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


# ---- gradients and hooks -------------------------------------------------------------


def double_backward(s: Setting) -> Seen:
    x = s.tokens().requires_grad_()
    y = s.compile(lambda x: attend(x) * 2)(x)
    (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    return {"dx": dx, "ddx": ddx}


def backward_twice(s: Setting) -> Seen:
    x = s.tokens().requires_grad_()
    y = s.compile(lambda x: attend(x) * 2)(x)
    y.sin().sum().backward(retain_graph=True)
    y.cos().sum().backward()
    return {"dx": x.grad}


def gradient_of_some_inputs(s: Setting) -> Seen:
    x, z = s.tokens().requires_grad_(), s.tokens(seed=2).requires_grad_()
    y = s.compile(lambda x, z: attend(x) * attend(z))(x, z)
    (dz,) = torch.autograd.grad(y.sum(), [z])
    return {"dz": dz}


def gradient_of_no_input(s: Setting) -> Seen:
    weight = s.tokens(E, E).requires_grad_()
    y = s.compile(lambda x, w: attend(x @ w))(s.tokens(), weight)
    y.sum().backward()
    return {"weight": weight.grad}


def output_is_detached(s: Setting) -> Seen:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = attend(x)
        return y.detach(), y * x.detach()

    return s.step(fn, s.tokens())


def two_losses(s: Setting) -> Seen:
    x = s.tokens().requires_grad_()
    a, b = s.compile(lambda x: (attend(x).sum(), attend(x).square().mean()))(x)
    (a * 0.5 + b).backward()
    return {"a": a, "b": b, "dx": x.grad}


def one_output_unused(s: Setting) -> Seen:
    x = s.tokens().requires_grad_()
    _, b = s.compile(lambda x: (attend(x), attend(x.sin()) * 2))(x)
    b.sum().backward()
    return {"b": b, "dx": x.grad}


def no_grad(s: Setting) -> Seen:
    with torch.no_grad():
        return {"y": s.compile(lambda x: attend(x) * 2)(s.tokens())}


def inference_mode(s: Setting) -> Seen:
    with torch.inference_mode():
        return {"y": s.compile(lambda x: attend(x) * 2)(s.tokens())}


def no_grad_inside(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = attend(x)
        return attend(x) * y

    return s.step(fn, s.tokens())


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return attend(self.inner(x)) + x


def forward_hook(s: Setting) -> Seen:
    layer = _Layer().to(s.dtype)
    layer.inner.register_forward_hook(lambda m, args, out: out * 2)
    layer.register_forward_pre_hook(lambda m, args: (args[0].sin(),))
    return s.step(layer, s.tokens())


def backward_hook(s: Setting) -> Seen:
    layer = _Layer().to(s.dtype)
    layer.inner.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    return s.step(layer, s.tokens())


def tensor_hook(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        y = attend(x)
        y.register_hook(lambda g: g * 3)
        return y * 2

    return s.step(fn, s.tokens())


def checkpoint_round_all(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda t: attend(attend(t)), x, use_reentrant=False)
        return y + attend(y)

    return s.step(fn, s.tokens())


def weight_normalised(s: Setting) -> Seen:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(E, E)).to(s.dtype)
    return s.step(lambda x: attend(layer(x)), s.tokens())


def anomaly_mode(s: Setting) -> Seen:
    with torch.autograd.set_detect_anomaly(mode=True):
        return s.step(lambda x: attend(x) * 2, s.tokens())


# ---- ranks that differ ---------------------------------------------------------------


def options_differ(s: Setting) -> Seen:
    layout = ("contiguous", "striped")[s.rank]
    call = s.compile(lambda x: attend(x) * 2, layout=layout)
    return run_step(call, s.tokens())


def outputs_differ(s: Setting) -> Seen:
    call = s.compile(lambda x: attend(x) * 2, grads=("summed", "local")[s.rank])
    return run_step(call, s.tokens())


def inputs_differ(s: Setting) -> Seen:
    return s.step(lambda x: attend(x) * 2, s.tokens(seed=1 + s.rank))


def masks_differ(s: Setting) -> Seen:
    kept = torch.arange(S) < torch.tensor([[S], [5 + s.rank]])
    return s.step(lambda x, m: attend(x, m[:, None, None]), s.tokens(), kept)


def lengths_differ(s: Setting) -> Seen:
    return s.step(lambda x: attend(x) * 2, s.tokens(B, S + 4 * s.rank, E))


def weights_differ(s: Setting) -> Seen:
    layer = _Layer()
    with torch.no_grad():
        layer.inner.weight.add_(s.rank)
    return s.step(layer.to(s.dtype), s.tokens())


def models_differ(s: Setting) -> Seen:
    """One rank has a layer more."""

    def fn(x: Tensor) -> Tensor:
        for _ in range(1 + s.rank):
            x = attend(x)
        return x

    return s.step(fn, s.tokens())


def one_rank_has_no_attention(s: Setting) -> Seen:
    fn = attend if s.rank == 0 else torch.sin
    return s.step(lambda x: fn(x) * 2, s.tokens())


def one_rank_has_a_gather_more(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        y = attend(x)
        return y if s.rank == 0 else y.flip(1)

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
    double_backward,
    backward_twice,
    gradient_of_some_inputs,
    gradient_of_no_input,
    output_is_detached,
    two_losses,
    one_output_unused,
    no_grad,
    inference_mode,
    no_grad_inside,
    forward_hook,
    backward_hook,
    tensor_hook,
    checkpoint_round_all,
    weight_normalised,
    anomaly_mode,
)
LOW_PRECISION = (nested_autocast, autocast_round_the_call)
DIFFERENT_RANKS = (
    options_differ,
    outputs_differ,
    inputs_differ,
    masks_differ,
    lengths_differ,
    weights_differ,
    models_differ,
    one_rank_has_no_attention,
    one_rank_has_a_gather_more,
)
