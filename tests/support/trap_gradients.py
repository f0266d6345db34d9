"""Traps of gradients and hooks, and of ranks that differ."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.traps import (
    B,
    E,
    S,
    Seen,
    Setting,
    attend,
    run_step,
)

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


def _double(_module: nn.Module, grads: Any, _given: Any) -> tuple[Tensor]:  # noqa: ANN401
    return (grads[0] * 2,)


def backward_hook(s: Setting) -> Seen:
    layer = _Layer().to(s.dtype)
    layer.inner.register_full_backward_hook(_double)
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


def gradients_differ(s: Setting) -> Seen:
    """One rank sums the gradients of weights, the other one doesn't."""
    layer = _Layer().to(s.dtype)
    call = s.compile(layer, grads=("summed", "local")[s.rank])
    seen = run_step(call, s.tokens())
    call(s.tokens()).sin().sum().backward()
    return seen | {n: p.grad for n, p in layer.named_parameters()}


def outputs_differ(s: Setting) -> Seen:
    """One rank gathers the output, the other one keeps its rows."""
    call = s.compile(lambda x: attend(x) * 2, outputs=("gathered", "sharded")[s.rank])
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


TRAPS = (
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
DIFFERENT_RANKS = (
    options_differ,
    gradients_differ,
    outputs_differ,
    inputs_differ,
    masks_differ,
    lengths_differ,
    weights_differ,
    models_differ,
    one_rank_has_no_attention,
)
