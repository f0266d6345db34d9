"""Attentions by flex_attention, each with what it computes as a dense mask or bias."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)
from torch.utils.checkpoint import checkpoint

from support.spellings import B, D, E, G, H, Heads, S, Spelling, merge, split

Scalar = Tensor
SHORT = 14  # tokens: no multiple of blocks nor of 3 ranks


def causal(b: Scalar, h: Scalar, i: Scalar, j: Scalar) -> Tensor:
    return i >= j


def near(b: Scalar, h: Scalar, i: Scalar, j: Scalar) -> Tensor:
    return (i - j).abs() <= 3


def of_head(b: Scalar, h: Scalar, i: Scalar, j: Scalar) -> Tensor:
    return i - j <= 2 * h


def make_mask(rule: Any, **given: Any) -> BlockMask:  # noqa: ANN401
    """A block mask of small blocks, made outside of what is compiled."""
    sizes = {"B": None, "H": None, "Q_LEN": S, "KV_LEN": S, "BLOCK_SIZE": 4} | given
    return create_block_mask(rule, device="cpu", **sizes)


def show(rule: Any, s: int = S, keys: int | None = None) -> Tensor:  # noqa: ANN401
    """What a rule keeps, pair by pair."""
    sizes = (B, H, s, keys or s)
    kept = [bool(rule(*map(torch.tensor, at))) for at in product(*map(range, sizes))]
    return torch.tensor(kept).view(sizes)


class Given(Heads):
    """flex_attention with a block mask that the module holds."""

    def __init__(self, mask: BlockMask, **call: Any) -> None:  # noqa: ANN401
        kv_heads = G if call.get("enable_gqa") else H
        super().__init__(partial(flex_attention, **call), kv_heads)
        self.mask = mask

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.out(merge(self.attend(q, k, v, block_mask=self.mask)))  # type: ignore[no-any-return]


class Dense(Heads):
    """The same with a dense mask."""

    def __init__(self, kept: Tensor, kv_heads: int = H) -> None:
        super().__init__(partial(attend_dense, kept=kept), kv_heads)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, *, kept: Tensor) -> Tensor:
    """Attention with a dense mask; a query without keys gives 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * D**-0.5).masked_fill(~kept, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~kept.any(-1, keepdim=True), 0)
    return weights @ v  # type: ignore[no-any-return]


def of_given(
    name: str,
    rule: Any,  # noqa: ANN401
    *,
    call: dict[str, Any] | None = None,
    length: int = S,
    **given: Any,  # noqa: ANN401
) -> Spelling:
    """A row for a rule whose block mask is passed in."""
    call = call or {}
    mask = make_mask(rule, Q_LEN=length, KV_LEN=length, **given)
    kept = show(rule, length)
    kv_heads = G if call.get("enable_gqa") else H
    return Spelling(
        name,
        lambda: Given(mask, **call),
        shape=(B, length, E),
        like=lambda: Dense(kept, kv_heads),
    )


# ---- scores --------------------------------------------------------------------------


class LearnedBias(nn.Module):
    """A learned number for each head and distance, by score_mod."""

    def __init__(self, *, is_flex: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, H * 9).view(H, 9))
        self.heads = Heads(self._attend_flex if is_flex else self._attend_dense)
        self.mask = make_mask(causal)

    def _attend_flex(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table = self.table

        def bias(score: Scalar, b: Scalar, h: Scalar, i: Scalar, j: Scalar) -> Tensor:
            return score + table[h, (i - j).clamp(-4, 4) + 4]

        return flex_attention(q, k, v, score_mod=bias, block_mask=self.mask)

    def _attend_dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(S)
        bias = self.table[:, (at[:, None] - at).clamp(-4, 4) + 4]
        kept = at[:, None] >= at
        bias = bias.masked_fill(~kept, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x)  # type: ignore[no-any-return]


def capped_alibi(score: Scalar, b: Scalar, h: Scalar, i: Scalar, j: Scalar) -> Tensor:
    return 2 * torch.tanh(score / 2) - (i - j).abs() * torch.exp2(-2.0 * (h + 1))


def attend_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(S)
    slopes = torch.exp2(-2.0 * (torch.arange(H) + 1))[:, None, None]
    scores = 2 * torch.tanh(q @ k.mT * 0.3 / 2) - (at[:, None] - at).abs() * slopes
    scores = scores.masked_fill(at[:, None] < at, -torch.inf)
    return scores.softmax(-1) @ v


class LearnedScale(nn.Module):
    """A learned factor for each head, which no ring carries."""

    def __init__(self, *, is_flex: bool) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 2, H))
        self.heads = Heads(self._attend_flex if is_flex else self._attend_dense)

    def _attend_flex(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        factor = self.factor

        def scale(score: Scalar, b: Scalar, h: Scalar, i: Scalar, j: Scalar) -> Tensor:
            return score * factor[h]

        return flex_attention(q, k, v, score_mod=scale)

    def _attend_dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * self.factor[:, None, None], k, v)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x)  # type: ignore[no-any-return]


LENGTHS = torch.tensor([S - 5, S])


def attend_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The block mask is made in the graph; queries of pads see nothing."""
    lengths = LENGTHS.clone()

    def inside(b: Scalar, h: Scalar, i: Scalar, j: Scalar) -> Tensor:
        return (i < lengths[b]) & (j < lengths[b])

    return flex_attention(q, k, v, block_mask=make_mask(inside, B=B))


def inside_lengths(b: Scalar, h: Scalar, i: Scalar, j: Scalar) -> Tensor:
    return (i < LENGTHS[b]) & (j < LENGTHS[b])


# ---- other calls ---------------------------------------------------------------------


class WithLse(Heads):
    """The lse is used too."""

    def __init__(self, *, is_flex: bool) -> None:
        super().__init__(self._attend_flex if is_flex else self._attend_dense)

    def _attend_flex(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flex_attention(q, k, v, return_lse=True)
        return out + lse[..., None]

    def _attend_dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * D**-0.5
        return scores.softmax(-1) @ v + scores.logsumexp(-1, keepdim=True)  # type: ignore[no-any-return]


class Cross(Heads):
    """Over a second sequence, of which each query sees the first keys."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__(attend)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        (memory,) = more
        q, k, v = split(self.q(x)), split(self.k(memory)), split(self.v(memory))
        return self.out(merge(self.attend(q, k, v)))  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    """Two layers under checkpointing, the block mask made in the graph around them."""

    def __init__(self, *, is_flex: bool) -> None:
        super().__init__()
        attend = _attend_by_mask if is_flex else _attend_by_kept
        self.layers = nn.ModuleList([Heads(attend), Heads(attend)])
        self.is_flex = is_flex
        self.kept = show(causal)

    def forward(self, x: Tensor) -> Tensor:
        mask = make_mask(causal) if self.is_flex else self.kept
        for layer in self.layers:
            x = x + checkpoint(partial(_run, layer, mask), x, use_reentrant=False)
        return x


def _run(layer: nn.Module, mask: object, x: Tensor) -> Tensor:
    return layer(x, mask)  # type: ignore[no-any-return]


def _attend_by_mask(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:  # noqa: ANN401
    return flex_attention(q, k, v, block_mask=mask)


def _attend_by_kept(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return attend_dense(q, k, v, kept=kept)


def listed_rows() -> BlockMask:
    """Lists that no rule comes with: each row of blocks sees itself and the first."""
    rows = torch.arange(S // 4)
    indices = torch.stack((rows, *[0 * rows] * 3), -1)[None, None].int()
    numbers = (1 + (rows > 0).int())[None, None].int()
    return BlockMask.from_kv_blocks(numbers, indices, BLOCK_SIZE=4, seq_lengths=(S, S))


def seen_in_listed(b: Scalar, h: Scalar, i: Scalar, j: Scalar) -> Tensor:
    return (i // 4 == j // 4) | (j // 4 == 0)


def _read_in_turn(documents: Tensor) -> Callable[..., Tensor]:
    def same(b: Scalar, h: Scalar, i: Scalar, j: Scalar) -> Tensor:
        return documents[b][i] == documents[b][j]

    return same


DOCUMENTS = (torch.arange(S) >= torch.tensor([[6], [9]])).long()

TABLE = (
    of_given("causal", causal),
    of_given("causal, blocks of 128", causal, BLOCK_SIZE=128),
    of_given("near, oblong blocks", near, BLOCK_SIZE=(4, 8)),
    of_given("each head its window", of_head, H=H),
    of_given("both rules", and_masks(causal, near), length=SHORT),
    of_given("documents", _read_in_turn(DOCUMENTS), B=B),
    of_given("grouped heads", causal, call={"enable_gqa": True}),
    of_given(
        "scale and options",
        causal,
        call={"scale": D**-0.5, "kernel_options": {"ROWS_GUARANTEED_SAFE": True}},
    ),
    of_given("rows without keys", lambda b, h, i, j: (i >= j) & (i > 5)),
    Spelling(
        "learned bias",
        lambda: LearnedBias(is_flex=True),
        like=lambda: LearnedBias(is_flex=False),
    ),
    Spelling(
        "learned scale",
        lambda: LearnedScale(is_flex=True),
        like=lambda: LearnedScale(is_flex=False),
    ),
    Spelling(
        "padding, made in the graph",
        lambda: Heads(attend_padded),
        like=lambda: Dense(show(inside_lengths)),
    ),
    Spelling(
        "softcap, ALiBi, causal, scale",
        lambda: Given(make_mask(causal), score_mod=capped_alibi, scale=0.3),
        like=lambda: Heads(attend_capped),
    ),
    Spelling("lse", lambda: WithLse(is_flex=True), like=lambda: WithLse(is_flex=False)),
    Spelling(
        "cross",
        lambda: Cross(partial(flex_attention, block_mask=make_mask(causal, KV_LEN=10))),
        ("memory",),
        like=lambda: Cross(partial(attend_dense, kept=show(causal, S, 10))),
    ),
    Spelling(
        "checkpoint",
        lambda: Checkpointed(is_flex=True),
        num_regions=2,
        like=lambda: Checkpointed(is_flex=False),
    ),
    Spelling(
        "lists alone",
        lambda: Given(listed_rows()),
        like=lambda: Dense(show(seen_in_listed)),
    ),
)
"""Rows whose block mask is passed in; of some it is made in the graph."""


def find_flex(name: str) -> Spelling:
    """The row of that name."""
    return next(s for s in TABLE if s.name == name)
