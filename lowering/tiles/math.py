"""One tile under a mask, as a blocked loop of plain operators.

The slow kernel that takes any mask, dtype and head sizes. Invariant: no buffer is
larger than ``(B, H, 128, 1024)``, so none grows faster than linearly in S.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.mask import Mask, evaluate
from ringcompile.ir.text import parse_mask

_Q_ROWS = 128
_KV_ROWS = 1024

_parse_mask = lru_cache(maxsize=256)(parse_mask)


@dataclass(frozen=True, slots=True)
class _Tile:
    """What both directions read.

    Attributes:
        q: ``(B, H, n, D)``.
        k: ``(B, G, m, D)``.
        v: ``(B, G, m, E)``.
        q_pos: ``(H or 1, n)`` global positions, -1 for no row.
        k_pos: ``(H or 1, m)``, one row per *query* head.
        captures: what the mask reads.
        mask: which pairs count.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_pos: Tensor
    k_pos: Tensor
    captures: Sequence[Tensor]
    mask: Mask

    @property
    def dtype(self) -> torch.dtype:
        """What the loop computes in."""
        return ops.accumulation_dtype(self.q.dtype)

    def q_blocks(self) -> Iterator[slice]:
        """The query rows, some at a time."""
        return _blocks(self.q.shape[2], _Q_ROWS)

    def kv_blocks(self) -> Iterator[slice]:
        """The KV rows, some at a time."""
        return _blocks(self.k.shape[2], _KV_ROWS)

    def scores(self, i: slice, j: slice, scale: float) -> Tensor | None:
        """Scaled scores of a block, -inf where masked; None if all are.

        Returns:
            ``(B, H, i, j)``.
        """
        keeps = self._keeps(i, j)
        if not keeps.any():
            return None
        scores = _per_kv_head(self.q[:, :, i].to(self.dtype), self.k.shape[1])
        scores = scores @ self.k[:, :, j].to(self.dtype).mT * scale
        scores = scores.view(*self.q.shape[:2], -1, scores.shape[-1])
        return scores.masked_fill_(~keeps, -torch.inf)

    def _keeps(self, i: slice, j: slice) -> Tensor:
        """Which pairs of a block count; broadcasts to ``(B, H, i, j)``."""
        q_pos = self.q_pos[None, :, i, None]
        k_pos = self.k_pos[None, :, None, j]
        device = self.q.device
        b = torch.arange(self.q.shape[0], device=device).view(-1, 1, 1, 1)
        h = torch.arange(self.q.shape[1], device=device).view(1, -1, 1, 1)
        at = (b, h, q_pos.clamp(min=0), k_pos.clamp(min=0))
        keeps = evaluate(self.mask.keeps, at, self.captures).to(device)
        return keeps & (q_pos >= 0) & (k_pos >= 0)


def _blocks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _per_kv_head(x_BHTD: Tensor, num_kv_heads: int) -> Tensor:
    """``(B, H, T, D)`` as ``(B, G, U * T, D)``: rows that share keys lie together."""
    B, _, _, D = x_BHTD.shape
    return x_BHTD.reshape(B, num_kv_heads, -1, D)


def _per_query_head(k_pos: Tensor, num_heads: int) -> Tensor:
    if k_pos.shape[0] == 1:
        return k_pos
    return k_pos.repeat_interleave(num_heads // k_pos.shape[0], 0)


def _masked_attention(  # noqa: PLR0913 - the op's schema
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    captures: Sequence[Tensor],
    *,
    mask: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    k_pos = _per_query_head(k_pos, q.shape[1])
    tile = _Tile(q, k, v, q_pos, k_pos, captures, _parse_mask(mask))
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=tile.dtype)
    lse = q.new_full(q.shape[:-1], -torch.inf, dtype=tile.dtype)
    for i in tile.q_blocks():
        out[:, :, i], lse[:, :, i] = _attend_rows(tile, i, scale)
    return out, lse


def _attend_rows(tile: _Tile, i: slice, scale: float) -> tuple[Tensor, Tensor]:
    """Online softmax of some query rows over all keys."""
    B, H = tile.q.shape[:2]
    G, E = tile.v.shape[1], tile.v.shape[-1]
    rows = i.stop - i.start
    top = tile.q.new_full((B, H, rows, 1), -torch.inf, dtype=tile.dtype)
    total = torch.zeros_like(top)
    out = tile.q.new_zeros((B, H, rows, E), dtype=tile.dtype)
    for j in tile.kv_blocks():
        scores = tile.scores(i, j, scale)
        if scores is None:
            continue
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        shift = new_top.masked_fill(new_top == -torch.inf, 0.0)
        weights = torch.exp_(scores - shift)
        shrink = torch.exp(top - shift)
        total = total * shrink + weights.sum(-1, keepdim=True)
        added = _per_kv_head(weights, G) @ tile.v[:, :, j].to(tile.dtype)
        out = out * shrink + added.view_as(out)
        top = new_top
    # Rows without a key: total is 0 and log gives the -inf that is meant.
    lse = top.masked_fill(top == -torch.inf, 0.0) + total.log()
    return out / total.masked_fill(total == 0, 1.0), lse.squeeze(-1)


def _masked_attention_backward(  # noqa: PLR0913, PLR0917 - the op's schema
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    captures: Sequence[Tensor],
    *,
    mask: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    k_pos = _per_query_head(k_pos, q.shape[1])
    tile = _Tile(q, k, v, q_pos, k_pos, captures, _parse_mask(mask))
    dq, dk, dv = (x.new_zeros(x.shape, dtype=tile.dtype) for x in (q, k, v))
    G = k.shape[1]
    for i in tile.q_blocks():
        q_i = _per_kv_head(q[:, :, i].to(tile.dtype), G)
        grad_i = grad_out[:, :, i].to(tile.dtype)
        delta = (grad_i * out[:, :, i]).sum(-1, keepdim=True)
        # A row without a key has weights exp(-inf - inf) = 0.
        lse_i = lse[:, :, i, None]
        lse_i = lse_i.masked_fill(lse_i == -torch.inf, torch.inf)
        grad_i = _per_kv_head(grad_i, G)
        for j in tile.kv_blocks():
            scores = tile.scores(i, j, scale)
            if scores is None:
                continue
            weights = torch.exp_(scores - lse_i)
            dv[:, :, j] += _per_kv_head(weights, G).mT @ grad_i
            d_weights = (grad_i @ v[:, :, j].to(tile.dtype).mT).view_as(weights)
            d_scores = _per_kv_head(weights * (d_weights - delta) * scale, G)
            dk[:, :, j] += d_scores.mT @ q_i
            added = d_scores @ k[:, :, j].to(tile.dtype)
            dq[:, :, i] += added.view(*q.shape[:2], -1, q.shape[-1])
    return dq, dk, dv


for _key in ("CPU", "CUDA"):
    ops.LIBRARY.impl("masked_attention", _masked_attention, _key)
    ops.LIBRARY.impl("masked_attention_backward", _masked_attention_backward, _key)
