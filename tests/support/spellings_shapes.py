"""Spellings of layout, of heads, and of what q, k and v are made from."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.spellings import (
    B,
    D,
    E,
    G,
    H,
    Heads,
    S,
    Spelling,
    merge,
    of_heads,
    split,
)

SCALE = D**-0.5


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-1) @ v  # type: ignore[no-any-return]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[-2]
    ahead = torch.ones(s, s, dtype=torch.bool).triu(1)
    return (q @ k.mT * SCALE).masked_fill(ahead, -torch.inf).softmax(-1) @ v  # type: ignore[no-any-return]


# ---- fewer heads of K and V ----------------------------------------------------------


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
    return _causal(q, k, v)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, g, s, d = k.shape
    k, v = (
        t[:, :, None].expand(b, g, H // g, s, d).reshape(b, H, s, d) for t in (k, v)
    )
    return _causal(q, k, v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Five dims, K and V broadcast over the queries of a group."""
    grouped_q = q.unflatten(1, (G, H // G))
    return _attend(grouped_q, k[:, :, None], v[:, :, None]).flatten(1, 2)


def grouped_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _causal(q.unflatten(1, (G, H // G)), k[:, :, None], v[:, :, None]).flatten(
        1, 2
    )


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped_q = q.unflatten(1, (G, H // G)) * SCALE
    weights = torch.einsum("bgusd,bgtd->bgust", grouped_q, k).softmax(-1)
    return torch.einsum("bgust,bgtd->bgusd", weights, v).flatten(1, 2)


def grouped_einsum_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped_q = (q.unflatten(1, (G, H // G)) * SCALE).permute(0, 3, 1, 2, 4)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    weights = torch.einsum("bsgud,btgd->bgust", grouped_q, k).softmax(-1)
    mixed = torch.einsum("bgust,btgd->bsgud", weights, v)
    return mixed.flatten(2, 3).transpose(1, 2)


def one_head_of_keys_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bkd->bhqk", q * SCALE, k[:, 0]).softmax(-1)
    return torch.einsum("bhqk,bkd->bhqd", weights, v[:, 0])


def one_head_of_keys_flat_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    k, v = k.squeeze(1), v.squeeze(1)
    found = (q.reshape(b, h * s, d) @ k.mT * SCALE).view(b, h, s, s)
    ahead = torch.ones(s, s, dtype=torch.bool).triu(1)
    weights = found.masked_fill(ahead, -torch.inf).softmax(-1)
    return (weights.view(b, h * s, s) @ v).view(b, h, s, d)  # type: ignore[no-any-return]


def gqa_of_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def one_head_of_keys_flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-query: queries of all heads in one long dim."""
    b, h, s, d = q.shape
    k, v = k.squeeze(1), v.squeeze(1)
    weights = (q.reshape(b, h * s, d) @ k.mT * SCALE).view(b, h, s, s).softmax(-1)
    return (weights.view(b, h * s, s) @ v).view(b, h, s, d)  # type: ignore[no-any-return]


# ---- one projection for q, k and v ---------------------------------------------------


class Fused(nn.Module):
    """One projection, taken apart by ``take``, which gives (B, H, S, D) each."""

    def __init__(self, take: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.take = take
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.take(self.qkv(x))
        return self.out(merge(_attend(q, k, v)))  # type: ignore[no-any-return]


def by_chunk(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(split(t) for t in x.chunk(3, dim=-1))


def by_split(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(split(t) for t in x.split(E, dim=2))


def by_permute(x: Tensor) -> tuple[Tensor, ...]:
    b, s, _ = x.shape
    qkv = x.reshape(b, s, 3, H, D).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


def by_unbind(x: Tensor) -> tuple[Tensor, ...]:
    qkv = x.reshape(x.shape[0], x.shape[1], 3, H, D).permute(2, 0, 3, 1, 4)
    return qkv.unbind(0)


def by_heads_first(x: Tensor) -> tuple[Tensor, ...]:
    """GPT-NeoX: each head's q, k and v lie together."""
    return x.view(*x.shape[:2], H, 3 * D).transpose(1, 2).chunk(3, dim=-1)


def by_slices(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(split(x[:, :, i * E : (i + 1) * E]) for i in range(3))


# ---- layouts -------------------------------------------------------------------------


def tokens_before_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Products over permuted views of (B, S, H, D)."""
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    weights = torch.matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1)) * SCALE
    out = torch.matmul(weights.softmax(-1), v.permute(0, 2, 1, 3))
    return out.permute(0, 2, 1, 3).contiguous().transpose(1, 2)


def loop_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([_causal(q[:, h], k[:, h], v[:, h]) for h in range(H)], dim=1)


class OneHead(nn.Module):
    """No dim of heads: (B, S, E)."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attend(self.q(x), self.k(x), self.v(x))
        return self.out(mixed)  # type: ignore[no-any-return]


def bmm_of_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.bmm(q, k.transpose(1, 2)).div(E**0.5).softmax(dim=-1)
    return torch.bmm(weights, v)


class SequenceFirst(nn.Module):
    """(S, B, E), batch and heads in one dim: as fairseq writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        s, b, _ = x.shape
        q, k, v = (
            f(x).contiguous().view(s, b * H, D).transpose(0, 1)
            for f in (self.q, self.k, self.v)
        )
        weights = torch.bmm(q * SCALE, k.transpose(1, 2)).softmax(-1)
        mixed = torch.bmm(weights, v).transpose(0, 1).contiguous().view(s, b, E)
        return self.out(mixed)  # type: ignore[no-any-return]


class SequenceFirstEinsum(nn.Module):
    """(S, B, E) by einsum: as XLNet writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Parameter(torch.randn(E, H, D) * E**-0.5) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            torch.einsum("ibe,ehd->ibhd", x, w) for w in (self.q, self.k, self.v)
        )
        scores = torch.einsum("ibhd,jbhd->bhij", q, k) * SCALE
        mixed = torch.einsum("bhij,jbhd->ibhd", scores.softmax(dim=3), v)
        return torch.einsum("ibhd,ehd->ibe", mixed, self.out)


class SequenceFirstPermuted(nn.Module):
    """(S, B, E) turned to (B, H, S, D) for SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        s, b, _ = x.shape
        q, k, v = self.qkv(x).view(s, b, 3, H, D).permute(2, 1, 3, 0, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.permute(2, 0, 1, 3).reshape(s, b, E))  # type: ignore[no-any-return]


class NoBatch(nn.Module):
    """(S, E), and (H, S, D) for SDPA or products."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(-1, H, D).transpose(0, 1) for f in (self.q, self.k, self.v)
        )
        return self.out(self.attend(q, k, v).transpose(0, 1).flatten(1))  # type: ignore[no-any-return]


def einsum_without_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("hqd,hkd->hqk", q, k) * SCALE).softmax(-1)
    return torch.einsum("hqk,hkd->hqd", weights, v)


class Image(nn.Module):
    """Tokens from a (B, E, 4, 4) picture and back."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(E, 3 * E, 1), nn.Conv2d(E, E, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, e, rows, columns = x.shape
        q, k, v = self.qkv(x).view(b, 3, H, D, rows * columns).unbind(1)
        weights = (q.mT @ k * SCALE).softmax(-1)
        mixed = (v @ weights.mT).reshape(b, e, rows, columns)
        return self.out(mixed)  # type: ignore[no-any-return]


# ---- two sequences -------------------------------------------------------------------


class Cross(Heads):
    """Keys and values from a second sequence of another length."""

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        (memory,) = more
        q, k, v = split(self.q(x)), split(self.k(memory)), split(self.v(memory))
        return self.out(merge(self.attend(q, k, v)))  # type: ignore[no-any-return]


class SelfThenCross(nn.Module):
    """A decoder's layer: over itself, then over a second sequence that attends too."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = Heads(_causal), Heads(_attend)
        self.cross = Cross(_attend)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        memory = memory + self.other(memory)
        x = x + self.own(x)
        return x + self.cross(x, memory)  # type: ignore[no-any-return]


def of_fused(name: str, take: Callable[[Tensor], tuple[Tensor, ...]]) -> Spelling:
    return Spelling(name, lambda: Fused(take))


SDPA = F.scaled_dot_product_attention
TABLE = (
    of_heads("K and V repeated", repeated, kv_heads=G),
    of_heads("K and V expanded", expanded, kv_heads=G),
    of_heads("heads in groups, 5-D", grouped, kv_heads=G),
    of_heads("heads in groups, 5-D, causal", grouped_causal, kv_heads=G),
    of_heads("heads in groups, einsum", grouped_einsum, kv_heads=G),
    of_heads("groups, einsum, tokens first", grouped_einsum_tokens_first, kv_heads=G),
    of_heads("one head of K and V, einsum", one_head_of_keys_einsum, kv_heads=1),
    of_heads(
        "one head of K and V, flat, causal", one_head_of_keys_flat_causal, kv_heads=1
    ),
    of_heads("enable_gqa", gqa_of_sdpa, kv_heads=G),
    of_heads("one head of K and V", _attend, kv_heads=1),
    of_heads("one head of K and V, flat queries", one_head_of_keys_flat, kv_heads=1),
    of_fused("fused: chunk", by_chunk),
    of_fused("fused: split", by_split),
    of_fused("fused: permute", by_permute),
    of_fused("fused: unbind", by_unbind),
    of_fused("fused: heads first", by_heads_first),
    of_fused("fused: slices", by_slices),
    of_heads("(B, S, H, D)", tokens_before_heads),
    of_heads("loop over heads", loop_over_heads, num_regions=H),
    Spelling("3-D: bmm", lambda: OneHead(bmm_of_one_head)),
    Spelling("3-D: operators", lambda: OneHead(_causal)),
    Spelling("3-D: SDPA", lambda: OneHead(SDPA)),
    Spelling("sequence first: bmm", SequenceFirst, shape=(S, B, E)),
    Spelling("sequence first: einsum", SequenceFirstEinsum, shape=(S, B, E)),
    Spelling("sequence first: SDPA", SequenceFirstPermuted, shape=(S, B, E)),
    Spelling("no batch: operators", lambda: NoBatch(_causal), shape=(S, E)),
    Spelling("no batch: einsum", lambda: NoBatch(einsum_without_batch), shape=(S, E)),
    Spelling("no batch: SDPA", lambda: NoBatch(SDPA), shape=(S, E)),
    Spelling("no batch, no heads: SDPA", lambda: OneHead(SDPA), shape=(S, E)),
    Spelling("no batch, no heads", lambda: OneHead(_causal), shape=(S, E)),
    Spelling("tokens of a picture", Image, shape=(B, E, 4, 4)),
    Spelling("cross: operators", lambda: Cross(_attend), ("memory",)),
    Spelling("cross: SDPA", lambda: Cross(SDPA), ("memory",)),
    Spelling("self, then cross", SelfThenCross, ("memory",), num_regions=3),
)
