"""Scores that are more than products: biases by position, softcaps, sinks, rotations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.spellings import D, E, H, Heads, S, Spelling, merge, of_heads, split

SCALE = D**-0.5
CAP = 2.0


def _slopes(dtype: torch.dtype) -> Tensor:
    return torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(H)], dtype=dtype)


def _ahead(s: int) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool).triu(1)


# ---- ALiBi ---------------------------------------------------------------------------


def alibi_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Under a causal mask, a bias by key alone is one by distance."""
    s = q.shape[2]
    bias = _slopes(q.dtype).view(1, H, 1, 1) * torch.arange(s).view(1, 1, 1, s)
    found = (q @ k.mT * SCALE + bias).masked_fill(_ahead(s), -math.inf)
    return found.softmax(-1) @ v  # type: ignore[no-any-return]


def alibi_of_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[2])
    distance = (position[:, None] - position[None, :]).abs()
    bias = -distance[None] * _slopes(q.dtype)[:, None, None]
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v  # type: ignore[no-any-return]


def alibi_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bloom's: the bias is what the product is added to."""
    b, h, s, d = q.shape
    alibi = _slopes(q.dtype)[:, None, None] * torch.arange(s)[None, None, :]
    alibi = alibi.repeat(b, 1, 1)
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    found = alibi.baddbmm(q, k.mT, beta=1.0, alpha=SCALE).view(b, h, s, s)
    weights = found.masked_fill(_ahead(s), torch.finfo(q.dtype).min).softmax(-1)
    return torch.bmm(weights.view(b * h, s, s), v).view(b, h, s, d)


def alibi_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[2]
    position = torch.arange(s)
    distance = (position[None, :] - position[:, None]).to(q.dtype)
    bias = _slopes(q.dtype).view(1, H, 1, 1) * distance
    mask = bias.masked_fill(_ahead(s), -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# ---- softcap and sinks ---------------------------------------------------------------


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = torch.tanh(q @ k.mT * SCALE / CAP) * CAP
    return found.softmax(-1) @ v


def softcap_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = torch.matmul(q, k.transpose(2, 3)) * SCALE
    found = found / CAP
    found = torch.tanh(found)
    found = found * CAP
    return F.softmax(found.masked_fill(_ahead(q.shape[2]), -math.inf), -1) @ v


class Sinks(Heads):
    """gpt-oss: one more column, a number for each head, which takes its share."""

    def __init__(self, *, is_causal: bool) -> None:
        super().__init__(self.attend_with_sinks)
        self.sinks = nn.Parameter(torch.linspace(-1, 1, H))
        self.is_causal = is_causal

    def attend_with_sinks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = q @ k.mT * SCALE
        if self.is_causal:
            found = found + torch.full(found.shape[-2:], -math.inf).triu(1)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(*found.shape[:3], -1)
        both = torch.cat([found, sinks], dim=-1)
        both = both - both.max(dim=-1, keepdim=True).values
        return F.softmax(both, dim=-1)[..., :-1] @ v


def softmax_off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sink of score 0: ``exp(x) / (1 + sum exp(x))``."""
    e = (q @ k.mT * SCALE).exp()
    return e / (1 + e.sum(-1, keepdim=True)) @ v  # type: ignore[no-any-return]


# ---- tables of learned biases --------------------------------------------------------


class TwoLayers(nn.Module):
    """T5: a bias by distance in buckets, made once, used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Heads(self.attend_with_bias)
        self.second = Heads(self.attend_with_bias)
        self.table = nn.Embedding(8, H)

    def attend_with_bias(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ((q @ k.mT + bias).float().softmax(-1)).type_as(v) @ v

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        bucket = _bucket(position[None, :] - position[:, None])
        bias = self.table(bucket).permute(2, 0, 1).unsqueeze(0)
        x = x + self.first(x, bias)
        return x + self.second(x, bias)  # type: ignore[no-any-return]


def _bucket(distance: Tensor) -> Tensor:
    """Eight buckets: exact up to 1, then in logarithmic steps; for both directions."""
    half, exact, farthest = 4, 2, 16
    size = distance.abs()
    far = torch.log(size.float() / exact) / math.log(farthest / exact)
    far = (exact + (far * (half - exact)).to(torch.long)).clamp(max=half - 1)
    return (distance > 0).long() * half + torch.where(size < exact, size, far)


class LearnedBias(Heads):
    """A learned number for each pair of positions, as in BEiT without its table."""

    def __init__(self) -> None:
        super().__init__(self.attend_with_bias)
        self.bias = nn.Parameter(torch.randn(1, H, S, S))

    def attend_with_bias(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * SCALE + self.bias).softmax(-1) @ v  # type: ignore[no-any-return]


class TableOfOffsets(Heads):
    """Swin: a table by two-dimensional offset, looked up by a buffer of indices."""

    index: Tensor

    def __init__(self, *, sdpa: bool = False) -> None:
        super().__init__(self.attend_with_table)
        side = math.isqrt(S)
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, H))
        place = torch.stack(
            torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ).flatten(1)
        offset = place[:, :, None] - place[:, None, :] + side - 1
        self.register_buffer("index", offset[0] * (2 * side - 1) + offset[1])
        self.sdpa = sdpa

    def attend_with_table(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(S, S, -1)
        bias = bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.sdpa:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return (q @ k.mT * SCALE + bias).softmax(-1) @ v  # type: ignore[no-any-return]


# ---- what happens to q and k before --------------------------------------------------


def _angles(s: int, dtype: torch.dtype) -> Tensor:
    frequency = 1.0 / (100.0 ** (torch.arange(0, D, 2, dtype=dtype) / D))
    return torch.outer(torch.arange(s, dtype=dtype), frequency)


def _turn_halves(x: Tensor) -> Tensor:
    angle = _angles(x.shape[2], x.dtype)
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def _turn_pairs(x: Tensor) -> Tensor:
    angle = _angles(x.shape[2], x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def _turn_complex(x: Tensor) -> Tensor:
    angle = _angles(x.shape[2], x.dtype)
    spin = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * spin).flatten(3).type_as(x)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = (q @ k.mT * SCALE).masked_fill(_ahead(q.shape[2]), -math.inf)
    return found.softmax(-1) @ v  # type: ignore[no-any-return]


def rotary_halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _causal(_turn_halves(q), _turn_halves(k), v)


def rotary_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _causal(_turn_pairs(q), _turn_pairs(k), v)


def rotary_complex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _causal(_turn_complex(q), _turn_complex(k), v)


class NormedHeads(Heads):
    """Queries and keys are normed in each head."""

    def __init__(self) -> None:
        super().__init__(self.attend_normed)
        self.q_norm, self.k_norm = nn.RMSNorm(D), nn.LayerNorm(D)

    def attend_normed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.q_norm(q) @ self.k_norm(k).mT * SCALE).softmax(-1) @ v  # type: ignore[no-any-return]


class TwoQueries(nn.Module):
    """Two attentions over the same keys and values; one minus the other."""

    def __init__(self) -> None:
        super().__init__()
        self.q1, self.q2, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(5))
        self.factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        q1, q2, k, v = (split(f(x)) for f in (self.q1, self.q2, self.k, self.v))
        first = (q1 @ k.mT * SCALE).softmax(-1) @ v
        second = F.scaled_dot_product_attention(q2, k, v, is_causal=True)
        return self.out(merge(first - self.factor * second))  # type: ignore[no-any-return]


class Differential(nn.Module):
    """The difference of two maps of weights, times the values: two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.q1, self.q2, self.k1, self.k2 = (nn.Linear(E, E) for _ in range(4))
        self.v, self.out = nn.Linear(E, E), nn.Linear(E, E)
        self.factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.q1, self.q2, self.k1, self.k2, self.v)
        q1, q2, k1, k2, v = (split(f(x)) for f in layers)
        first = (q1 @ k1.mT * SCALE).softmax(-1)
        second = (q2 @ k2.mT * SCALE).softmax(-1)
        return self.out(merge((first - self.factor * second) @ v))  # type: ignore[no-any-return]


TABLE = (
    of_heads("ALiBi of keys", alibi_of_keys),
    of_heads("ALiBi of distance", alibi_of_distance),
    of_heads("ALiBi: baddbmm", alibi_baddbmm),
    of_heads("ALiBi: SDPA", alibi_sdpa),
    of_heads("softcap", softcap),
    of_heads("softcap, causal", softcap_causal),
    Spelling("sinks", lambda: Sinks(is_causal=False)),
    Spelling("sinks, causal", lambda: Sinks(is_causal=True)),
    of_heads("softmax off by one", softmax_off_by_one),
    Spelling("buckets shared by two layers", TwoLayers, num_regions=2),
    Spelling("learned bias of pairs", LearnedBias),
    Spelling("table of offsets", TableOfOffsets),
    Spelling("table of offsets: SDPA", lambda: TableOfOffsets(sdpa=True)),
    of_heads("rotary, halves", rotary_halves),
    of_heads("rotary, pairs", rotary_pairs),
    of_heads("rotary, complex", rotary_complex),
    Spelling("queries and keys normed", NormedHeads),
    Spelling("keys and values of two regions", TwoQueries, num_regions=2),
    Spelling("difference of weights", Differential, num_regions=2),
)
