"""Traps of nothing to attend to, and of transforms of functions inside the call."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.traps import SCALE, B, D, E, S, Seen, Setting, attend, merge, split

# ---- nothing -------------------------------------------------------------------------


def no_batch(s: Setting) -> Seen:
    return s.step(lambda x: attend(x) * 2, s.tokens(0, S, E))


def no_batch_of_known_heads(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (E // D, D)).transpose(1, 2)
        weights = (q @ q.mT).softmax(-1)
        return merge(weights @ q.sin())

    return s.step(fn, s.tokens(0, S, E))


def no_tokens(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (E // D, D)).transpose(1, 2)
        return merge(
            F.scaled_dot_product_attention(q, q.sin(), q.cos(), is_causal=True)
        )

    return s.step(fn, s.tokens(B, 0, E))


def no_tokens_spelled(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (E // D, D)).transpose(1, 2)
        return merge((q @ q.mT).softmax(-1) @ q.sin())

    return s.step(fn, s.tokens(B, 0, E))


def no_keys(s: Setting) -> Seen:
    def fn(x: Tensor, memory: Tensor) -> Tensor:
        q, k = (t.unflatten(-1, (E // D, D)).transpose(1, 2) for t in (x, memory))
        return merge(F.scaled_dot_product_attention(q, k, k.sin()))

    return s.step(fn, s.tokens(), s.tokens(B, 0, E))


# ---- transforms ----------------------------------------------------------------------


def vmap_inside(s: Setting) -> Seen:
    """Attention of one sequence, mapped over the batch."""

    def one(x: Tensor) -> Tensor:
        q = split(x[None])
        out = F.scaled_dot_product_attention(q, q.sin(), q.cos(), is_causal=True)
        return merge(out)[0]

    def fn(x: Tensor) -> Tensor:
        return torch.vmap(one)(x) * 2

    return s.step(fn, s.tokens())


def vmap_of_a_spelled_attention(s: Setting) -> Seen:
    def one(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (-1, D)).transpose(0, 1)
        weights = (q @ q.mT).softmax(-1)
        return (weights @ q.sin()).transpose(0, 1).flatten(1)  # type: ignore[no-any-return]

    def fn(x: Tensor) -> Tensor:
        return torch.vmap(one)(x) * 2

    return s.step(fn, s.tokens())


def spelled(x: Tensor) -> Tensor:
    """Attention that eager can differentiate twice."""
    q = split(x)
    return merge((q @ q.mT * SCALE).softmax(-1) @ q.sin())


def gradient_of(attention: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    gradient: Any = torch.func.grad(_sum_of(attention))

    def fn(x: Tensor) -> Tensor:
        return gradient(x) * 2  # type: ignore[no-any-return]

    return fn


def _sum_of(attention: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda y: attention(y).sin().sum()


def grad_inside(s: Setting) -> Seen:
    """A gradient is part of what is computed."""
    return s.step(gradient_of(spelled), s.tokens())


def grad_inside_and_none_outside(s: Setting) -> Seen:
    with torch.no_grad():
        return {"out": s.compile(gradient_of(spelled))(s.tokens())}


def grad_of_sdpa_and_none_outside(s: Setting) -> Seen:
    with torch.no_grad():
        return {"out": s.compile(gradient_of(attend))(s.tokens())}


def vjp_inside(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        made: Any = torch.func.vjp(spelled, x)
        out, back = made
        return out + back(out.cos())[0]  # type: ignore[no-any-return]

    return s.step(fn, s.tokens())


def jvp_inside(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        made: Any = torch.func.jvp(spelled, (x,), (x.cos(),))
        out, tangent = made
        return out + tangent  # type: ignore[no-any-return]

    return s.step(fn, s.tokens())


TRAPS = (
    no_batch,
    no_batch_of_known_heads,
    no_tokens,
    no_tokens_spelled,
    no_keys,
    vmap_inside,
    vmap_of_a_spelled_attention,
    grad_inside,
    grad_inside_and_none_outside,
    grad_of_sdpa_and_none_outside,
    vjp_inside,
    jvp_inside,
)
