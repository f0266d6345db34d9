"""The reference against what SEMANTICS.md says, spelled out pair by pair."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringcompile import reference
from ringcompile.ir.mask import (
    EmptyRow,
    Mask,
    causal,
    conjunction,
    documents,
    key_padding,
    prefix,
    window,
)

B, H, G, S, D, E = 2, 4, 2, 11, 5, 3
SEGMENTS, RATES = (4, 8, 11), (1, 2, 3)


def tensors(**sizes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    heads, kv_heads = sizes.get("H", H), sizes.get("G", G)
    q, k, v, grad = (
        torch.randn(
            B, n, S, d, generator=random, dtype=torch.float64, requires_grad=True
        )
        for n, d in ((heads, D), (kv_heads, D), (kv_heads, E), (heads, E))
    )
    return q, k, v, grad.detach()


CAPTURES = [
    torch.arange(S).expand(B, S) // 4,
    (torch.arange(S) > 2).expand(B, S).long(),
]


def test_attention_is_torchs() -> None:
    q, k, v, _ = tensors()
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(reference.attention(q, k, v, mask=causal()), want)
    scaled = reference.attention(q, k, v, mask=causal(), scale=0.3)
    want = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, scale=0.3
    )
    torch.testing.assert_close(scaled, want)


def test_masks_with_captures_are_torchs() -> None:
    q, k, v, _ = tensors()
    mask = conjunction(documents(0), window(3, 3))
    at = torch.arange(S)
    kept = (at[:, None] // 4 == at // 4) & ((at[:, None] - at).abs() <= 3)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=True)
    torch.testing.assert_close(
        reference.attention(q, k, v, mask=mask, captures=CAPTURES), want
    )


def test_biases_are_torchs() -> None:
    q, k, v, _ = tensors()
    bias = torch.randn(1, H, S, S, dtype=torch.float64).tril().requires_grad_()
    hidden = bias.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=True)
    for got in (
        reference.attention(q, k, v, bias=hidden),
        reference.attention(q, k, v, bias=bias, mask=causal()),
    ):
        torch.testing.assert_close(got, want)
        for ours, torchs in zip(
            *(
                torch.autograd.grad(x.sin().sum(), (q, bias), retain_graph=True)
                for x in (got, want)
            ),
            strict=True,
        ):
            torch.testing.assert_close(ours, torchs)


def test_softcap_and_sinks_pair_by_pair() -> None:
    q, k, v, _ = (x.detach() for x in tensors(G=H))
    sinks, softcap = torch.randn(H, dtype=torch.float64), 0.7
    out = reference.attention(
        q, k, v, mask=causal(), scale=0.3, softcap=softcap, sinks=sinks
    )
    for h in range(H):
        for i in range(S):
            weights = [
                math.exp(
                    softcap * math.tanh(0.3 * float(q[0, h, i] @ k[0, h, j]) / softcap)
                )
                for j in range(i + 1)
            ]
            total = sum(weights) + math.exp(sinks[h])
            want = sum(w / total * v[0, h, j] for j, w in enumerate(weights))
            torch.testing.assert_close(out[0, h, i], want)


def test_lse_is_the_log_of_the_denominator() -> None:
    q, k, _, _ = (x.detach() for x in tensors())
    got = reference.log_sum_exp(
        q, k, mask=conjunction(causal(), key_padding(1)), captures=CAPTURES
    )
    for h in range(H):
        for p in range(S):
            keys = range(3, p + 1)
            terms = [
                math.exp(float(q[1, h, p] @ k[1, h // 2, j]) * D**-0.5) for j in keys
            ]
            want = math.log(sum(terms)) if terms else -math.inf
            assert float(got[1, h, p]) == pytest.approx(want)


@pytest.mark.parametrize("empty_row", EmptyRow)
def test_rows_without_a_key(empty_row: EmptyRow) -> None:
    q, k, v, grad = tensors()
    mask = Mask(conjunction(causal(), key_padding(1)), 2, empty_row)
    out = reference.attention(q, k, v, mask=mask, captures=CAPTURES)
    empty, full = out[:, :, :3], out[:, :, 3:]
    assert not full.isnan().any()
    if empty_row is EmptyRow.NAN:
        assert empty.isnan().all()
        return
    out.backward(grad)
    assert not any(x.grad is None or x.grad.isnan().any() for x in (q, k, v))
    assert q.grad is not None
    # Only an added mask lets the scores of an empty row have a gradient.
    assert bool(q.grad[:, :, :3].any()) is (empty_row is EmptyRow.MEAN_ALL)
    if empty_row in (EmptyRow.MEAN_ALL, EmptyRow.MEAN_FILLED):
        want = v.mean(2, keepdim=True).repeat_interleave(H // G, 1).expand_as(empty)
        torch.testing.assert_close(empty, want)
    else:
        assert not empty.any()


def selected(h: int, p: int, w: int, r: int, offset: str) -> bool:
    s = {"paper": h % r, "torchscale": h // math.ceil(H / r), "kv_head": h // 2 % r}[
        offset
    ]
    return (p % w) % r == s


@pytest.mark.parametrize("offset", ["paper", "torchscale", "kv_head"])
def test_longnet_mixes_patterns_by_their_denominators(offset: str) -> None:
    q, k, v, _ = (x.detach() for x in tensors())
    got = reference.longnet(
        q, k, v, segments=SEGMENTS, rates=RATES, offset=offset, mask=causal()
    )
    for h in range(H):
        for p in range(S):
            total, mixed = 0.0, torch.zeros(E, dtype=torch.float64)
            for w, r in zip(SEGMENTS, RATES, strict=True):
                if not selected(h, p, w, r, offset):
                    continue
                for j in range(p // w * w, p + 1):
                    if selected(h, j, w, r, offset):
                        a = math.exp(float(q[0, h, p] @ k[0, h // 2, j]) * D**-0.5)
                        total += a
                        mixed = mixed + a * v[0, h // 2, j]
            want = mixed / total if total else mixed
            torch.testing.assert_close(got[0, h, p], want)


def test_detached_weights_change_gradients_only() -> None:
    q, k, v, grad = tensors(G=H)
    options = {"segments": SEGMENTS, "rates": RATES, "mask": causal()}
    joint = reference.longnet(q, k, v, **options)
    detached = reference.longnet(q, k, v, weights="detached", **options)
    torch.testing.assert_close(joint, detached)
    (dv_joint,) = torch.autograd.grad(joint, v, grad, retain_graph=True)
    dq, dk, dv = torch.autograd.grad(detached, (q, k, v), grad)
    torch.testing.assert_close(dv, dv_joint)
    # dA = sum_i W_i * (dO V^T - rowsum(dO * O_i)), W_i = m_i e^A / sum_j Z_j.
    scores = D**-0.5 * q @ k.mT
    pairs = [
        torch.tensor(
            [
                [
                    [
                        j <= p
                        and p // w == j // w
                        and selected(h, p, w, r, "paper")
                        and selected(h, j, w, r, "paper")
                        for j in range(S)
                    ]
                    for p in range(S)
                ]
                for h in range(H)
            ]
        )
        for w, r in zip(SEGMENTS, RATES, strict=True)
    ]
    whole = sum(m * scores.exp() for m in pairs).sum(-1, keepdim=True)
    d_scores = torch.zeros_like(scores)
    for m in pairs:
        own = m * scores.exp()
        out = own @ v / own.sum(-1, keepdim=True).clamp(min=1e-300)
        d_scores += own / whole * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    torch.testing.assert_close(dq, D**-0.5 * d_scores @ k)
    torch.testing.assert_close(dk, D**-0.5 * d_scores.mT @ q)


def test_one_pattern_has_nothing_to_mix() -> None:
    q, k, v, grad = tensors()
    grads = [
        torch.autograd.grad(
            reference.longnet(q, k, v, segments=(8,), rates=(2,), weights=weights),
            q,
            grad,
        )[0]
        for weights in ("joint", "detached")
    ]
    torch.testing.assert_close(*grads)


def test_local_windows_count_blocks() -> None:
    q, k, v, _ = tensors()
    block = torch.arange(S) // 2
    near = (block[:, None] - block).abs() <= 1  # (5 // 2) // 2
    kept = near & (torch.arange(S) <= torch.arange(S)[:, None])
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=True)
    got = reference.local_window(q, k, v, window=5, block=2, mask=causal())
    torch.testing.assert_close(got, want)


def test_the_reference_is_float64() -> None:
    q, k, v, _ = (x.float() for x in tensors())
    assert reference.attention(q, k, v, mask=prefix(4)).dtype == torch.float64
