"""What every pattern computes, dense and in float64, written from SEMANTICS.md.

Tests compare with this and with no other implementation. Invariant: nothing here knows
of ranks, layouts or schedules; gradients are autograd's.
"""

import math
from collections.abc import Sequence

import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import TRUE, EmptyRow, Mask


def attention(  # noqa: PLR0913 - all that changes scores
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Boolean = TRUE,
    captures: Sequence[Tensor] = (),
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Exact attention (section 1).

    Args:
        q: ``(B, H, S, D)``.
        k: ``(B, G, S, D)``; H is a multiple of G. S may be another than that of ``q``.
        v: ``(B, G, S, E)``.
        mask: the pairs that count, and what a row without a key gives.
        captures: what the mask reads.
        scale: factor of ``<Q, K>``; None for ``D ** -0.5``.
        softcap: scaled scores x become ``softcap * tanh(x / softcap)``; None: they
            stay.
        bias: then added, broadcast to ``(B, H, S, S)``; -inf drops a pair.
        sinks: ``(H,)``, the score of one more key per head, whose value is 0.

    Returns:
        float64 ``(B, H, S, E)``.
    """
    empty_row = mask.empty_row if isinstance(mask, Mask) else EmptyRow.ZERO
    kept = kept_pairs(mask, q, captures, num_keys=k.shape[2])
    scores = _scores(q, k, scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        kept = kept & (bias != -torch.inf)
        scores = scores + torch.where(bias == -torch.inf, 0.0, bias.double())
    if sinks is not None:
        return _mix_with_sinks(scores, kept, _per_query_head(v, q), sinks)
    out = _mix(scores, kept.double(), _per_query_head(v, q))
    some = kept.any(-1, keepdim=True)
    if empty_row is EmptyRow.NAN:
        return torch.where(some, out, torch.nan)
    if empty_row is EmptyRow.MEAN_FILLED:
        return torch.where(some, out, _per_query_head(v, q).mean(2, keepdim=True))
    if empty_row is EmptyRow.MEAN_ALL:  # all weights equal, whatever the scores
        uniform = (scores - scores.detach()).softmax(-1)
        return torch.where(some, out, uniform @ _per_query_head(v, q))
    return out


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask | Boolean = TRUE,
    captures: Sequence[Tensor] = (),
    scale: float | None = None,
) -> Tensor:
    """Natural log of the softmax denominator, ``(B, H, S)``; -inf without a key."""
    kept = kept_pairs(mask, q, captures, num_keys=k.shape[2])
    return _scores(q, k, scale).masked_fill(~kept, -torch.inf).logsumexp(-1)


def longnet(  # noqa: PLR0913 - the pattern's own parameters
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Sequence[int],
    rates: Sequence[int],
    offset: str = "paper",
    weights: str = "joint",
    mask: Mask | Boolean = TRUE,
    captures: Sequence[Tensor] = (),
    scale: float | None = None,
) -> Tensor:
    """Dilated attention in which every head uses every pattern (section 2A).

    Args:
        q: ``(B, H, S, D)``.
        k: ``(B, G, S, D)``.
        v: ``(B, G, S, E)``.
        segments: ``w_i``, tokens.
        rates: ``r_i``.
        offset: ``paper``, ``torchscale`` or ``kv_head``.
        weights: ``joint``, or ``detached``: gradients as if the mixing weights of the
            patterns were constants.
        mask: the user's own.
        captures: what the mask reads.
        scale: factor of ``<Q, K>``; None for ``D ** -0.5``.

    Returns:
        float64 ``(B, H, S, E)``; 0 where no pattern gives a key.
    """
    scores, values = _scores(q, k, scale), _per_query_head(v, q)
    user = kept_pairs(mask, q, captures)
    counts = [
        (user & _longnet_pairs(q, k.shape[1], w, r, offset)).double()
        for w, r in zip(segments, rates, strict=True)
    ]
    total = torch.stack(counts).sum(0)
    if weights == "joint":
        return _mix(scores, total, values)
    denominators = [_denominator(scores, c) for c in counts]
    whole = torch.stack(denominators).sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.stack(
        [
            (z / whole).detach() * _mix(scores, c, values)
            for z, c in zip(denominators, counts, strict=True)
        ]
    ).sum(0)


def local_window(  # noqa: PLR0913 - the pattern's own parameters
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    block: int = 64,
    mask: Mask | Boolean = TRUE,
    captures: Sequence[Tensor] = (),
    scale: float | None = None,
) -> Tensor:
    """Blocks at most ``(window // block) // 2`` apart (section 3); as `attention`."""
    block_of = torch.arange(q.shape[2]) // block
    near = (block_of[:, None] - block_of).abs() <= window // block // 2
    kept = kept_pairs(mask, q, captures) & near
    return _mix(_scores(q, k, scale), kept.double(), _per_query_head(v, q))


def chosen_blocks(  # noqa: PLR0913 - the pattern's own parameters
    q: Tensor,
    k: Tensor,
    *,
    keep: int,
    block: int = 64,
    is_causal: bool = False,
    visible: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Blocks that ``Adaptive`` keeps (section 3).

    Args:
        q: ``(B, H, S, D)``.
        k: ``(B, G, S, D)``.
        keep: blocks in each row, the own one among them.
        block: tokens in a block.
        is_causal: whether only earlier blocks are candidates.
        visible: which keys count, bool ``(B, S)``; None: all.
        scale: factor of ``<Q, K>``; None for ``D ** -0.5``.

    Returns:
        bool ``(B, H, num_blocks, num_blocks)``.
    """
    B, H, S, D = q.shape
    q, k = q.detach().double(), _per_query_head(k.detach(), q)
    counts = torch.ones(B, S) if visible is None else visible
    on = torch.zeros(B, H, -(-S // block), -(-S // block), dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            sums = []
            for start in range(0, S, block):
                rows = torch.arange(start, min(start + block, S))
                seen = rows[counts[b, rows] != 0]
                q_sum = q[b, h, start] if is_causal else q[b, h, rows].mean(0)
                sums.append((q_sum, k[b, h, seen].mean(0) if len(seen) else None))
            for i, (q_sum, _) in enumerate(sums):
                scores = {
                    j: float(q_sum @ k_sum) * (D**-0.5 if scale is None else scale)
                    for j, (_, k_sum) in enumerate(sums)
                    if k_sum is not None and (j < i if is_causal else j != i)
                }
                best = sorted(scores, key=lambda j: (-scores[j], j))
                on[b, h, i, [i, *best[: keep - 1]]] = True
    return on


def kept_pairs(
    mask: Mask | Boolean,
    q: Tensor,
    captures: Sequence[Tensor] = (),
    *,
    num_keys: int | None = None,
) -> Tensor:
    """A mask as bool ``(B, H, S, keys)``, for ``q`` of ``(B, H, S, D)``; S keys."""
    B, H, S, _ = q.shape
    num_keys = S if num_keys is None else num_keys
    at = (
        torch.arange(B).view(-1, 1, 1, 1),
        torch.arange(H).view(1, -1, 1, 1),
        torch.arange(S).view(1, 1, -1, 1),
        torch.arange(num_keys).view(1, 1, 1, -1),
    )
    keeps = mask.keeps if isinstance(mask, Mask) else mask
    return evaluate(keeps, at, captures).expand(B, H, S, num_keys)


def _longnet_pairs(
    q: Tensor, num_kv_heads: int, segment: int, rate: int, offset: str
) -> Tensor:
    """``m_i(h, q, k)`` without the user's mask, ``(H, S, S)``."""
    H, S = q.shape[1:3]
    h, p = torch.arange(H), torch.arange(S)
    s = {
        "paper": h % rate,
        "torchscale": h // math.ceil(H / rate),
        "kv_head": h // (H // num_kv_heads) % rate,
    }[offset]
    selected = p % segment % rate == s[:, None]
    same_segment = p[:, None] // segment == p // segment
    return selected[:, :, None] & selected[:, None] & same_segment


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.double().repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return scale * (q.double() @ _per_query_head(k, q).mT)


def _mix(scores: Tensor, counts: Tensor, values: Tensor) -> Tensor:
    """``softmax(A + log C) V``, 0 in rows where C is 0 everywhere."""
    some = (counts > 0).any(-1, keepdim=True)
    # In rows without a key any finite scores do: autograd of all -inf would be NaN.
    log_counts = torch.where(some, counts.log(), 0.0)
    return (scores + log_counts).softmax(-1) @ values * some


def _mix_with_sinks(
    scores: Tensor, kept: Tensor, values: Tensor, sinks: Tensor
) -> Tensor:
    """The same with a last key that every query has."""
    last = sinks.double().view(1, -1, 1, 1).expand_as(scores[..., :1])
    counts = torch.cat([kept, torch.ones_like(kept[..., :1])], -1).double()
    values = torch.cat([values, torch.zeros_like(values[:, :, :1])], 2)
    return _mix(torch.cat([scores, last], -1), counts, values)


def _denominator(scores: Tensor, counts: Tensor) -> Tensor:
    """``sum_k C e^A`` up to a factor of each row, ``(B, H, S, 1)``."""
    top = scores.amax(-1, keepdim=True)
    return (counts * (scores - top).exp()).sum(-1, keepdim=True)
