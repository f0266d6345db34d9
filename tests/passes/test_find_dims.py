"""Attention is found whatever its dims are, and with all that changes its scores."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.attentions import trace
from torch import Tensor

B, H, G, S, D, E = 2, 6, 3, 10, 8, 5
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_qkv(kv_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, S, D), (B, kv_heads, S, D), (B, kv_heads, S, E))
    q, k, v = (torch.randn(s, generator=generator) for s in shapes)
    return q, k, v


def ahead() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu(1)


def finish(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return finish(q @ k.mT * 0.5, v)


DENSE: dict[str, Attend] = {
    "sdpa": F.scaled_dot_product_attention,
    "multiplied": multiplied,
}


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    weights = torch.bmm(q * D**-0.5, k.mT).softmax(-1)
    return torch.bmm(weights, v).view(B, H, S, E)


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = torch.arange(float(S)).expand(B * H, 1, S)
    scores = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=D**-0.5)
    scores = scores.unflatten(0, (B, H)).masked_fill(ahead(), -math.inf)
    weights = scores.softmax(-1).flatten(0, 1)
    return torch.bmm(weights, v).view(B, H, S, E)


def in_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (G, H // G))
    k, v = k[:, :, None], v[:, :, None]
    return finish(q @ k.mT, v).flatten(1, 2)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.mT @ (k @ q.mT).softmax(-2)


def with_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return finish(torch.tanh(q @ k.mT / 30) * 30, v)


def with_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return finish((q @ k.mT + k @ q.mT) * 0.5, v)


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sinks = torch.arange(float(H)).view(1, H, 1, 1).expand(B, H, S, 1)
    scores = torch.cat([q @ k.mT, sinks], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


def with_soft_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return finish(q @ k.mT + (torch.arange(S) < 3) * -10000.0, v)


def with_mask_in_the_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.arange(float(S)).masked_fill(ahead(), -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


CARRIED: dict[str, tuple[Attend, int, str]] = {
    "bmm": (by_bmm, H, "all"),
    "baddbmm": (by_baddbmm, H, "k <= q"),
    "groups": (in_groups, G, "all"),
    "keys first": (keys_first, H, "all"),
    "softcap": (with_softcap, H, "all"),
    "another product": (with_products, H, "all"),
    "a sink": (with_sink, H, "all"),
    "soft mask": (with_soft_mask, H, "all"),
    "mask in the bias": (with_mask_in_the_bias, H, "k <= q"),
}


# All sizes become symbols there, which these spell as numbers.
STATIC = {"a sink", "baddbmm", "mask in the bias", "bmm", "groups"}
DYNAMIC = [(name, True) for name in CARRIED if name not in STATIC]


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, False) for name in CARRIED), *DYNAMIC]
)
def test_dims_and_scores_are_carried(name: str, *, dynamic: bool) -> None:
    attend, kv_heads, mask = CARRIED[name]
    region = trace(attend, *make_qkv(kv_heads), dynamic=dynamic).region()
    assert str(region.mask) == mask
    assert region.k.shape[1] == kv_heads


@pytest.mark.parametrize("name", ["sdpa", "multiplied"])
def test_three_dims(name: str) -> None:
    region = trace(DENSE[name], *(x[0] for x in make_qkv())).region()
    assert region.q.shape == (H, 1, S, D)


@pytest.mark.parametrize("name", ["sdpa", "multiplied"])
def test_autocast_casts_operands(name: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return DENSE[name](q, k, v)

    assert trace(attend, *make_qkv()).region().q.node.meta["val"].dtype == torch.float32
