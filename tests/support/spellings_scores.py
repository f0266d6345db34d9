"""Spellings of Q.K, of its scale, of softmax and of P.V, without masks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.spellings import D, E, H, Heads, Spelling, merge, of_heads, split

SCALE = D**-0.5


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * SCALE  # type: ignore[no-any-return]


# ---- products ------------------------------------------------------------------------


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D)).softmax(-1)
    return torch.matmul(weights, v)


def operators(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT * SCALE, dim=-1) @ v


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * SCALE, dim=2)
    return torch.bmm(weights, v).view(b, h, s, d)


def bmm_scores_unflattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    weights = torch.bmm(q * SCALE, k.mT).view(b, h, s, s).softmax(-1)
    return torch.bmm(weights.view(b * h, s, s), v).view(b, h, s, d)


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    nothing = torch.empty(b * h, s, s, dtype=q.dtype)
    found = torch.baddbmm(nothing, q, k.mT, beta=0, alpha=SCALE)
    return torch.bmm(found.softmax(-1), v).view(b, h, s, d)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def einsum_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def einsum_in_jax_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = torch.einsum("bthd,bThd->bhtT", q * SCALE, k).softmax(dim=-1)
    return torch.einsum("bhtT,bThd->bthd", weights, v).transpose(1, 2)


def einsum_merged_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    weights = (torch.einsum("nqd,nkd->nqk", q, k) * SCALE).softmax(-1)
    return torch.einsum("nqk,nkd->nqd", weights, v).unflatten(0, (-1, H))  # type: ignore[no-any-return]


def einsum_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhkd,bhqd->bhkq", k, q * SCALE).softmax(dim=2)
    return torch.einsum("bhkq,bhkd->bhqd", weights, v)


def einsum_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("...qd,...kd->...qk", q, k) * SCALE).softmax(-1)
    return torch.einsum("...qk,...kd->...qd", weights, v)


def einsum_heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (torch.einsum("bqhd,bkhd->bqkh", q, k) * SCALE).softmax(2)
    return torch.einsum("bqkh,bkhd->bqhd", weights, v).transpose(1, 2)


def broadcast_and_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = (q[:, :, :, None, :] * k[:, :, None, :, :]).sum(-1) * SCALE
    weights = found.softmax(-1)
    return (weights[..., None] * v[:, :, None, :, :]).sum(3)  # type: ignore[no-any-return]


def broadcast_and_sum_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(dim=-1) / math.sqrt(D)
    return found.softmax(-1) @ v


def keys_times_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT * SCALE).softmax(-2).mT @ v  # type: ignore[no-any-return]


def keys_times_queries_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT * SCALE).mT.softmax(-1) @ v  # type: ignore[no-any-return]


def values_times_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ scores(q, k).softmax(-1).mT).mT


def all_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Channels first, as in convolutional networks."""
    q, k, v = (t.mT.contiguous() for t in (q, k, v))
    weights = torch.softmax(k.mT @ q * SCALE, dim=-2)
    return (v @ weights).mT


# ---- scale ---------------------------------------------------------------------------


def scale_on_q(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * SCALE) @ k.mT).softmax(-1) @ v  # type: ignore[no-any-return]


def scale_on_k(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k.transpose(2, 3) / math.sqrt(D))).softmax(-1) @ v


def root_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = D**-0.25
    return ((q * root) @ (k * root).mT).softmax(-1) @ v  # type: ignore[no-any-return]


def by_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / torch.sqrt(torch.tensor(float(D)))).softmax(-1) @ v


def by_rsqrt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = torch.rsqrt(torch.tensor(q.shape[-1], dtype=q.dtype))
    return (q @ k.mT).mul(scale).softmax(-1) @ v


def by_size_to_a_power(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = torch.matmul(q, k.mT) / (v.size(-1) ** 0.5)
    return torch.matmul(nn.functional.softmax(found, dim=-1), v)


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


class ScaleInWeight(Heads):
    """The scale is multiplied into the projection of q."""

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q = F.linear(x, self.q.weight * SCALE, self.q.bias * SCALE)
        q, k, v = (split(t) for t in (q, self.k(x), self.v(x)))
        return self.out(merge(unscaled(q, k, v)))  # type: ignore[no-any-return]


class ScaleBuffer(Heads):
    """The scale is a buffer without dims."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__(unscaled)
        self.register_buffer("scale", torch.tensor(SCALE))

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.out(merge((q @ k.mT * self.scale).softmax(-1) @ v))  # type: ignore[no-any-return]


class TemperatureOfTokens(Heads):
    """Each query of each head has a factor, made from the token."""

    def __init__(self) -> None:
        super().__init__(unscaled)
        self.factor = nn.Linear(E, H)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (split(layer(x)) for layer in (self.q, self.k, self.v))
        factor = self.factor(x).exp().transpose(1, 2).unsqueeze(-1)
        return self.out(merge((q @ k.mT / factor).softmax(-1) @ v))  # type: ignore[no-any-return]


class LearnedTemperature(Heads):
    """A learned factor for each head, as in the second Swin."""

    def __init__(self) -> None:
        super().__init__(unscaled)
        self.logit = nn.Parameter(torch.linspace(-1, 1, H).view(H, 1, 1))

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (split(layer(x)) for layer in (self.q, self.k, self.v))
        found = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        weights = (found * self.logit.clamp(max=math.log(100)).exp()).softmax(-1)
        return self.out(merge(weights @ v))  # type: ignore[no-any-return]


# ---- softmax -------------------------------------------------------------------------


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def float_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).float().softmax(-1).type_as(v) @ v


class SoftmaxModule(Heads):
    """torch's modules of softmax and dropout."""

    def __init__(self, rate: float) -> None:
        super().__init__(self.attend_by_modules)
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(rate)

    def attend_by_modules(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.dropout(self.softmax(scores(q, k))) @ v  # type: ignore[no-any-return]


def softmax_over_dim_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), 3).matmul(v)


def log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).log_softmax(-1).exp() @ v


def exp_over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / e.sum(-1, keepdim=True) @ v


def minus_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = scores(q, k)
    e = torch.exp(found - found.max(dim=-1, keepdim=True)[0])
    return torch.matmul(e / torch.sum(e, dim=-1, keepdim=True), v)


def minus_amax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = scores(q, k)
    e = torch.exp(found - found.amax(-1, keepdim=True).detach())
    return (e / e.sum(-1).unsqueeze(-1)) @ v


def minus_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = scores(q, k)
    return torch.exp(found - torch.logsumexp(found, dim=-1, keepdim=True)) @ v


def divided_after_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = scores(q, k)
    e = torch.exp(found - found.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


def divided_late_in_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    e = torch.exp(torch.bmm(q, k.mT) * SCALE)
    out = torch.bmm(e, v).view(b, h, s, d)
    return out / e.view(b, h, s, s).sum(-1).unsqueeze(-1)


def beside_a_small_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / (e.sum(-1, keepdim=True) + 1e-2) @ v


def dropout_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.dropout(scores(q, k).softmax(-1), p=0.0, training=True)
    return weights.contiguous() @ v


class FusedHeads(nn.Module):
    """No functions: everything in one forward, as in teaching code."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        queries = self.q(x).reshape(b, s, H, D).permute(0, 2, 1, 3)
        keys = self.k(x).reshape(b, s, H, D).permute(0, 2, 3, 1)
        values = self.v(x).reshape(b, s, H, D).permute(0, 2, 1, 3)
        attention = torch.softmax((queries @ keys) / (D**0.5), dim=-1)
        mixed = (attention @ values).permute(0, 2, 1, 3).reshape(b, s, E)
        return self.out(mixed)  # type: ignore[no-any-return]


TABLE = (
    of_heads("matmul", matmul),
    of_heads("operators", operators),
    of_heads("bmm", bmm),
    of_heads("bmm, scores with heads", bmm_scores_unflattened),
    of_heads("baddbmm", baddbmm),
    of_heads("einsum", einsum),
    of_heads("einsum of (B, S, H, D)", einsum_tokens_first),
    of_heads("einsum in letters of two cases", einsum_in_jax_letters),
    of_heads("einsum, batch merged with heads", einsum_merged_batch),
    of_heads("einsum, keys first", einsum_keys_first),
    of_heads("einsum with an ellipsis", einsum_ellipsis),
    of_heads("einsum, heads last", einsum_heads_last),
    of_heads("both products as sums", broadcast_and_sum),
    of_heads("scores as a sum", broadcast_and_sum_of_scores),
    of_heads("keys times queries", keys_times_queries),
    of_heads("keys times queries, turned", keys_times_queries_turned),
    of_heads("values times weights", values_times_weights),
    of_heads("channels before tokens", all_turned),
    of_heads("scale on q", scale_on_q),
    of_heads("scale on k", scale_on_k),
    of_heads("root of scale on both", root_on_both),
    of_heads("scale by a tensor", by_a_tensor),
    of_heads("scale by rsqrt", by_rsqrt),
    of_heads("scale by a size", by_size_to_a_power),
    of_heads("no scale", unscaled),
    Spelling("scale in the weight", lambda: ScaleInWeight(unscaled)),
    Spelling("scale in a buffer", ScaleBuffer),
    Spelling("learned temperature", LearnedTemperature),
    of_heads("softmax in float32", upcast),
    of_heads("float and back", float_and_back),
    Spelling("modules", lambda: SoftmaxModule(0.0)),
    Spelling("modules in eval", lambda: SoftmaxModule(0.5).eval()),
    of_heads("softmax over dim 3", softmax_over_dim_3),
    of_heads("log_softmax and exp", log_softmax),
    of_heads("exp over sum", exp_over_sum),
    of_heads("exp minus max over sum", minus_max),
    of_heads("exp minus amax over sum", minus_amax),
    of_heads("exp minus logsumexp", minus_logsumexp),
    of_heads("divided after the product", divided_after_the_product),
    of_heads("divided after the product, in bmm", divided_late_in_bmm),
    of_heads("beside a small number", beside_a_small_number),
    Spelling("temperature of each token", TemperatureOfTokens),
    of_heads("dropout of nothing", dropout_of_nothing),
    Spelling("all in one forward", FusedHeads),
)
