"""Attention is found in every spelling, and nothing else is."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.attentions import trace, trace_model
from torch import Tensor, nn

from ringcompile.ir.mask import TRUE, EmptyRow, Mask, causal, conjunction, key_padding
from ringcompile.passes.read_score import Score

B, H, G, S, D, E = 2, 6, 3, 10, 8, 5
LOWEST = torch.finfo(torch.float32).min
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_qkv(
    kv_heads: int = H, *, length: int = S, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, S, D), (B, kv_heads, length, D), (B, kv_heads, length, E))
    q, k, v = (torch.randn(s, generator=generator) for s in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def ahead() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu(1)


def finish(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


# ---- spellings -----------------------------------------------------------------------


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * D**-0.5
    weights = F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype)
    return F.dropout(weights, p=0.0, training=True).contiguous() @ v


def exp_over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / math.sqrt(D)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) @ v


def plain_exp_over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT / math.sqrt(D))
    weights = e / e.sum(dim=-1, keepdim=True)
    return torch.matmul(weights, v)


def logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * D**-0.5
    return torch.matmul((scores - scores.logsumexp(-1, keepdim=True)).exp(), v)


def minus_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * D**-0.5
    return finish(scores - scores.amax(-1, keepdim=True).detach(), v)


DENSE: dict[str, Attend] = {
    "sdpa": F.scaled_dot_product_attention,
    "sdpa with scale": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, scale=D**-0.5
    ),
    "multiplied": lambda q, k, v: finish(q @ k.transpose(-2, -1) * D**-0.5, v),
    "divided": lambda q, k, v: finish(q @ k.transpose(2, 3) / math.sqrt(D), v),
    "by a tensor": lambda q, k, v: finish(
        torch.matmul(q, k.mT) / torch.full((), math.sqrt(D)), v
    ),
    "number first": lambda q, k, v: finish(D**-0.5 * (q @ k.permute(0, 1, 3, 2)), v),
    "in two steps": lambda q, k, v: finish(2 * (q @ k.mT / (2 * math.sqrt(D))), v),
    "upcast": upcast,
    "exp over sum": exp_over_sum,
    "plain exp over sum": plain_exp_over_sum,
    "logsumexp": logsumexp,
    "minus max": minus_max,
    "dropout in eval": lambda q, k, v: (
        F.dropout((q @ k.mT * D**-0.5).softmax(-1), p=0.5, training=False) @ v
    ),
}


@pytest.mark.parametrize("spelling", DENSE)
def test_spellings_of_dense_attention(spelling: str) -> None:
    region = trace(DENSE[spelling], *make_qkv()).region()
    assert region.mask == Mask()
    assert region.scale == pytest.approx(D**-0.5)
    operands = (region.q, region.k, region.v)
    assert [o.node.op for o in operands] == ["placeholder"] * 3
    assert not any(o.transposed for o in operands)


def test_scale_of_an_operand_stays_with_it() -> None:
    region = trace(
        lambda q, k, v: finish((q * 0.5) @ (k / 3).mT, v), *make_qkv()
    ).region()
    assert region.scale == 1.0
    assert region.q.node.name == "mul"
    assert region.k.node.name == "div"


def test_k_made_transposed_is_used_as_it_is() -> None:
    q, k, v = make_qkv()
    region = trace(lambda q, k, v: finish(q @ k, v), q, k.mT.contiguous(), v).region()
    assert region.k.transposed
    assert region.k.transposed


MASKED: dict[str, tuple[Callable[[Tensor], Tensor], EmptyRow]] = {
    "masked_fill -inf": (lambda a: a.masked_fill(ahead(), -math.inf), EmptyRow.NAN),
    "masked_fill min": (
        lambda a: a.masked_fill(ahead(), LOWEST),
        EmptyRow.MEAN_FILLED,
    ),
    "where": (lambda a: torch.where(ahead(), LOWEST, a), EmptyRow.MEAN_FILLED),
    "where kept": (lambda a: torch.where(~ahead(), a, -math.inf), EmptyRow.NAN),
    "scaled over the edge": (
        lambda a: a.masked_fill(ahead(), LOWEST) * 4,
        EmptyRow.NAN,
    ),
    "where of tensors": (
        lambda a: torch.where(ahead(), torch.full((S, S), -math.inf), a),
        EmptyRow.NAN,
    ),
    "added": (
        lambda a: torch.zeros(S, S).masked_fill(ahead(), -math.inf) + a,
        EmptyRow.NAN,
    ),
    "added 4-D": (
        lambda a: a + torch.where(ahead(), LOWEST, 0.0)[None, None],
        EmptyRow.MEAN_ALL,
    ),
    "before the scale": (
        lambda a: (a * 4).masked_fill(ahead(), -math.inf) / 4,
        EmptyRow.NAN,
    ),
}


@pytest.mark.parametrize("spelling", MASKED)
def test_spellings_of_masked_scores(spelling: str) -> None:
    mask, _ = MASKED[spelling]
    region = trace(lambda q, k, v: finish(mask(q @ k.mT), v), *make_qkv()).region()
    assert region.mask == Mask(causal())


@pytest.mark.parametrize("spelling", sorted(set(MASKED) - {"added 4-D"}))
def test_what_a_query_without_keys_gives(spelling: str) -> None:
    """Left padding beside causality; ``region()`` compares with the graph's own."""
    mask, want = MASKED[spelling]
    low = -math.inf if want is EmptyRow.NAN else LOWEST

    def attend(q: Tensor, k: Tensor, v: Tensor, pads: Tensor) -> Tensor:
        scores = mask((q @ k.mT).masked_fill(pads[:, None, None], low))
        return finish(scores, v)

    pads = torch.arange(S).expand(B, -1) < 3
    region = trace(attend, *make_qkv(), pads).region()
    assert region.mask.empty_row is want


def test_a_repeated_q_keeps_its_heads() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(repeat_kv(q[:, :G]), k, v)

    region = trace(attend, *make_qkv()).region()
    assert region.q.node.meta["val"].shape[1] == H


def test_a_low_number_that_a_cast_rounds_to_infinity_is_infinite() -> None:
    score = Score(1.0).fill(TRUE, LOWEST, torch.float32)
    assert score.empty_row(EmptyRow.NAN) is EmptyRow.MEAN_FILLED
    assert score.cast(torch.bfloat16).empty_row(EmptyRow.NAN) is EmptyRow.NAN


def test_masks_in_several_steps_are_joined() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(kept[:, None, None] == 0, LOWEST)
        return finish(scores.masked_fill(ahead(), LOWEST) * 1.0, v)

    kept = (torch.arange(S).expand(B, -1) < 7).long()
    region = trace(attend, *make_qkv(), kept).region()
    want = conjunction(causal(), key_padding(0))
    assert region.mask == Mask(want, 1, EmptyRow.MEAN_FILLED)


# ---- heads ---------------------------------------------------------------------------


def repeat_kv(x: Tensor) -> Tensor:
    b, heads, s, d = x.shape
    return x[:, :, None, :, :].expand(b, heads, H // heads, s, d).reshape(b, H, s, d)


REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": repeat_kv,
    "repeat_interleave": lambda x: x.repeat_interleave(H // G, dim=1),
    "stack": lambda x: x.unsqueeze(2).repeat(1, 1, H // G, 1, 1).flatten(1, 2),
    "late": lambda x: repeat_kv(x.mT.contiguous().mT),
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("repeat", REPEATS)
def test_k_and_v_are_unrepeated(repeat: str, *, eager: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = REPEATS[repeat](k), REPEATS[repeat](v)
        return finish(q @ k.mT, v) if eager else F.scaled_dot_product_attention(q, k, v)

    region = trace(attend, *make_qkv(G)).region()
    assert [o.node.name for o in (region.k, region.v)] == ["k_1", "v_1"]


def test_gqa_of_sdpa() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    region = trace(attend, *make_qkv(G)).region()
    assert region.k.node.op == "placeholder"


def test_one_head_of_k_and_v_for_all() -> None:
    region = trace(lambda q, k, v: finish(q @ k.mT, v), *make_qkv(1)).region()
    assert region.k.node.meta["val"].shape[1] == 1


def test_tiled_heads_are_not_taken_for_repeated_ones() -> None:
    """Head h would use head ``h % G``: K and V travel with all their heads."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tile = (1, H // G, 1, 1)
        return F.scaled_dot_product_attention(q, k.repeat(tile), v.repeat(tile))

    region = trace(attend, *make_qkv(G)).region()
    assert [o.node.meta["val"].shape[1] for o in (region.k, region.v)] == [H, H]


def test_k_and_v_keep_equally_many_heads() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tiled = v.repeat(1, H // G, 1, 1)
        return F.scaled_dot_product_attention(q, repeat_kv(k), tiled)

    region = trace(attend, *make_qkv(G)).region()
    assert [o.node.meta["val"].shape[1] for o in (region.k, region.v)] == [H, H]


# ---- refusals ------------------------------------------------------------------------


def returns_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def changes_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores += torch.zeros(S, S).masked_fill(ahead(), -math.inf)
    return finish(scores, v)


def with_sink_per_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, torch.zeros(B, H, S, 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v


REFUSED: dict[str, tuple[Callable[..., object], str]] = {
    "sdpa dropout": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=1.0),
        "dropout p=1.0",
    ),
    "dropout": (
        lambda q, k, v: (
            F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.1), 0.2, training=True) @ v
        ),
        "dropouts p=[0.1, 0.2]",
    ),
    "tanh of masked scores": (
        lambda q, k, v: finish(
            torch.tanh((q @ k.mT).masked_fill(ahead(), -math.inf)), v
        ),
        "isn't a function",
    ),
    "weights returned": (returns_weights, "also used by output"),
    "weights changed": (
        lambda q, k, v: ((q @ k.mT).softmax(-1) * 0.5) @ v,
        "also used by mul",
    ),
    "weights summed": (
        lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ v + w.sum(-1, keepdim=True),
        "also used by sum",
    ),
    "two products": (
        lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ v + w @ v,
        "also used by matmul",
    ),
    "scores squared": (lambda q, k, v: finish((q @ k.mT) ** 2, v), "scores go through"),
    "scale per key": (
        lambda q, k, v: finish(q @ k.mT * torch.arange(1.0, 11), v),
        "isn't a function",
    ),
    "over queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "over dim 2"),
    "weights second": (
        lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).to(torch.float32),
        "over dim 3",
    ),
    "scores in place": (changes_in_place, "add_"),
    "a sink per query": (with_sink_per_query, "isn't a function"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_ring_carries_is_refused(name: str) -> None:
    attend, what = REFUSED[name]
    refusal = trace(attend, *make_qkv()).refusal()
    assert what in refusal.what
    assert refusal.because
    assert refusal.instead
    assert refusal.where.endswith(f"{refusal.output.name})") or refusal.where


@pytest.mark.parametrize("name", ["sdpa", "multiplied", "causal", "eager causal"])
@pytest.mark.parametrize("length", [S - 1, 3 * S])
def test_keys_of_another_length(length: int, name: str) -> None:
    def mask_ahead(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        above = torch.ones(S, length, dtype=torch.bool).triu(1)
        return finish((q @ k.mT).masked_fill(above, -math.inf), v)

    def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    attend = {"causal": causal_sdpa, "eager causal": mask_ahead, **DENSE}[name]
    region = trace(attend, *make_qkv(length=length)).region()
    assert region.is_cross
    assert region.mask.keeps == (causal() if "causal" in name else TRUE)


def test_a_query_may_see_no_key_of_a_shorter_sequence() -> None:
    """Query 9 sees the keys from 6 on, of which there are none."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        apart = torch.arange(S)[:, None] - torch.arange(5)
        return finish((q @ k.mT).masked_fill((apart > 3) | (apart < 0), LOWEST), v)

    region = trace(attend, *make_qkv(length=5)).region()
    assert region.mask.empty_row is EmptyRow.MEAN_FILLED


@pytest.mark.parametrize("eager", [False, True])
def test_a_single_key_is_refused(*, eager: bool) -> None:
    attend = DENSE["multiplied" if eager else "sdpa"]
    refusal = trace(attend, *make_qkv(length=1)).refusal()
    assert refusal.because


def test_one_query_is_refused() -> None:
    q, k, v = make_qkv()
    refusal = trace(DENSE["sdpa"], q[:, :, :1], k, v).refusal()
    assert "1 queries over 10 keys" in refusal.what


def test_exp_and_sum_are_refused_if_a_query_may_see_no_key() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~kept[:, None, None], LOWEST)
        e = scores.exp()
        return e / e.sum(-1, keepdim=True) @ v

    kept = torch.arange(S).expand(B, -1) < 7
    assert "exp and sum" in trace(attend, *make_qkv(), kept).refusal().what


def test_half_precision_min_beside_padding_is_refused() -> None:
    """In float16, ``score + finfo.min`` still depends on the score: no plain mean."""

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        mask = torch.where(m, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])

    kept = torch.arange(S).expand(B, -1) < 7
    assert (
        "no key"
        in trace(attend, *make_qkv(dtype=torch.float16), kept).refusal().because
    )
    trace(attend, *make_qkv(dtype=torch.bfloat16), kept).region()


# ---- what is no attention ------------------------------------------------------------


class Router(nn.Module):
    """Mixture of experts: weights over experts, not over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(4, E))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.gate(x).softmax(-1), self.experts)


def test_weights_over_rows_of_a_parameter_are_no_attention() -> None:
    assert trace_model(Router(), {"x": torch.randn(B, S, D)}).find() == ()


class Memory(nn.Module):
    """``softmax(q @ W) @ W2`` with four dims: looks like attention, has no K."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(H, D, S))
        self.values = nn.Parameter(torch.randn(H, S, E))

    def forward(self, q: Tensor) -> Tensor:
        return torch.matmul((q @ self.keys).softmax(-1), self.values)


class ChannelAttention(nn.Module):
    """XCiT: scores of channels with channels; the tokens are summed over."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, H, D).permute(2, 0, 3, 4, 1).unbind(0)
        return torch.matmul((q @ k.mT).softmax(-1), v)


class Gate(nn.Module):
    """A softmax of a product of activations with weights, then another product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul((x @ self.weight).softmax(-1), self.weight)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Memory(), (B, H, S, D)),
        (ChannelAttention(), (B, S, H * D)),
        (Gate(), (B, S, D)),
    ],
)
def test_what_only_looks_like_attention_is_not_found(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    (name,) = [n for n in module.forward.__annotations__ if n != "return"]
    assert trace_model(module, {name: torch.randn(shape)}).find() == ()


def test_a_softmax_of_logits_is_no_attention() -> None:
    assert trace(lambda q, k, v: (q @ k.mT).softmax(-1).sum(), *make_qkv()).find() == ()
