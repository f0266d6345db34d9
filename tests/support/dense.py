"""Attention as SEMANTICS.md section 1 defines it, dense and in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import EmptyRow, Mask


def keeps(
    mask: Mask,
    captures: Sequence[Tensor],
    shape: tuple[int, int, int],
    keys: int | None = None,
) -> Tensor:
    """The mask as a bool tensor ``(B, H, S, S)``, or of so many ``keys``."""
    B, H, S = shape
    keys = keys or S
    at = (
        torch.arange(B).view(-1, 1, 1, 1),
        torch.arange(H).view(1, -1, 1, 1),
        torch.arange(S).view(1, 1, -1, 1),
        torch.arange(keys).view(1, 1, 1, -1),
    )
    return evaluate(mask.keeps, at, captures).expand(B, H, S, keys)


def attend(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, empty: EmptyRow
) -> Tensor:
    """Dense attention; ``kept`` is bool, or counts of how often each pair counts."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = scale * (q @ k.mT)
    if empty is EmptyRow.MEAN_FILLED:
        lowest = torch.finfo(torch.float32).min
        return scores.masked_fill(kept == 0, lowest).softmax(-1) @ v
    if empty is EmptyRow.MEAN_ALL:
        lowest = torch.finfo(torch.float32).min
        return (scores + torch.where(kept > 0, 0.0, lowest)).softmax(-1) @ v
    weights = (scores + kept.to(scores.dtype).log()).softmax(-1)
    if empty is EmptyRow.ZERO:
        # Not zeros times NaN: such rows have no gradient either.
        some = (kept > 0).any(-1, keepdim=True)
        safe = torch.where(some, kept.to(scores.dtype), 1.0)
        weights = (scores + safe.log()).softmax(-1) * some
    return weights @ v


def attend_detached(
    q: Tensor, k: Tensor, v: Tensor, by_part: Tensor, scale: float
) -> Tensor:
    """Parts mixed by ``Z_i / sum_j Z_j`` as constants; ``by_part`` is bool, by part."""
    lse = torch.stack(
        [
            (scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT))
            .masked_fill(~kept, -torch.inf)
            .logsumexp(-1)
            for kept in by_part
        ]
    )
    weights = (lse - lse.logsumexp(0)).exp().nan_to_num(0.0).detach()
    outs = [attend(q, k, v, kept, scale, EmptyRow.ZERO) for kept in by_part]
    return (weights[..., None] * torch.stack(outs)).sum(0)
