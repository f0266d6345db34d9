"""One tile under a mask, as a blocked loop of plain operators.

The slow kernel that takes any mask, dtype and head sizes, and visits blocks in any
order. Invariant: no buffer beside running results is larger than ``(B, H, 128, 1024)``,
so none grows faster than linearly in S; where classes of rows are batches, they are B.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.hilbert import order_blocks
from ringcompile.ir.mask import Mask
from ringcompile.ir.text import parse_mask
from ringcompile.lowering.tiles.biases import TileBias
from ringcompile.lowering.tiles.dropout import find_kept

_Q_ROWS = 128
_KV_ROWS = 1024

_Cells = Iterable[tuple[int, int]]


def _order_rows(num_rows: int, num_columns: int) -> _Cells:
    """All keys of some queries, then those of the next."""
    return ((i, j) for i in range(num_rows) for j in range(num_columns))


# Of a grid of query blocks i by KV blocks j, which follows which.
_ORDERS: Mapping[str, Callable[[int, int], _Cells]] = MappingProxyType(
    {"natural": _order_rows, "hilbert": order_blocks}
)


class _Scores(NamedTuple):
    """Scores of a block.

    Attributes:
        values: ``(B, H, i, j)``, -inf where masked.
        slope: their derivative by scaled products; None: 1.
    """

    values: Tensor
    slope: Tensor | None


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
        dropout: share of weights that are dropped.
        seed: number of the capture that holds the seed of those.
        softcap: scaled products x become ``softcap * tanh(x / softcap)``.
        biases: what is then added.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_pos: Tensor
    k_pos: Tensor
    captures: Sequence[Tensor]
    mask: Mask
    dropout: float = 0.0
    seed: int = -1
    softcap: float | None = None
    biases: Sequence[TileBias] = ()

    @property
    def dtype(self) -> torch.dtype:
        """What the loop computes in."""
        return ops.accumulation_dtype(self.q.dtype)

    def blocks(self, order: str) -> Iterable[tuple[slice, slice]]:
        """Query rows and KV rows of every block, in the order of that name."""
        q, kv = _cut(self.q.shape[2], _Q_ROWS), _cut(self.k.shape[2], _KV_ROWS)
        return ((q[i], kv[j]) for i, j in _ORDERS[order](len(q), len(kv)))

    def scores(
        self, i: slice, j: slice, scale: float, *, has_slope: bool = False
    ) -> _Scores | None:
        """Scores of a block; None if all are masked.

        Args:
            i: query rows.
            j: KV rows.
            scale: factor of products.
            has_slope: whether their slope is wanted.
        """
        keeps = self._keeps(i, j)
        if not keeps.any():
            return None
        scores = _per_kv_head(self.q[:, :, i].to(self.dtype), self.k.shape[1])
        scores = scores @ self.k[:, :, j].to(self.dtype).mT * scale
        scores = scores.view(*self.q.shape[:2], -1, scores.shape[-1])
        slope = None
        if self.softcap is not None:
            bent = scores.div_(self.softcap).tanh_()
            slope = 1 - bent.square() if has_slope else None
            scores = bent.mul_(self.softcap)
        for bias in self.biases:
            scores += bias.block(i, j, self.dtype)
        return _Scores(scores.masked_fill_(~keeps, -torch.inf), slope)

    def _keeps(self, i: slice, j: slice) -> Tensor:
        """Which pairs of a block count; broadcasts to ``(B, H, i, j)``."""
        q_pos = self.q_pos[None, :, i, None]
        k_pos = self.k_pos[None, :, None, j]
        keeps = evaluate(self.mask.keeps, self._at(i, j), self.captures)
        return keeps.to(self.q.device) & (q_pos >= 0) & (k_pos >= 0)

    def drop(self, weights: Tensor, i: slice, j: slice) -> Tensor:
        """Weights of a block, or gradients of those, after dropout."""
        if not self.dropout:
            return weights
        kept = find_kept(self.captures[self.seed], self._at(i, j), self.dropout)
        return weights.masked_fill(~kept, 0.0) / (1 - self.dropout)

    def _at(self, i: slice, j: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where each pair of a block stands: batch, query head, query, key."""
        device = self.q.device
        b = torch.arange(self.q.shape[0], device=device).view(-1, 1, 1, 1)
        h = torch.arange(self.q.shape[1], device=device).view(1, -1, 1, 1)
        q_pos = self.q_pos[None, :, i, None].clamp(min=0)
        return b, h, q_pos, self.k_pos[None, :, None, j].clamp(min=0)


def _build_tile(  # noqa: PLR0913, PLR0917 - the ops' schemas
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    mask: str,
    dropout: float,
    seed: int,
    softcap: float | None,
    relative: Sequence[int],
) -> _Tile:
    k_pos = _per_query_head(k_pos, q.shape[1])
    added = [TileBias(x, n in relative, q_pos, k_pos) for n, x in enumerate(biases)]
    rows = (q, k, v, q_pos, k_pos, captures)
    return _Tile(*rows, parse_mask(mask), dropout, seed, softcap, added)


def _cut(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _per_kv_head(x_BHTD: Tensor, num_kv_heads: int) -> Tensor:
    """``(B, H, T, D)`` as ``(B, G, U * T, D)``: rows that share keys lie together."""
    B, _, _, D = x_BHTD.shape
    return x_BHTD.reshape(B, num_kv_heads, -1, D)


def _per_query_head(k_pos: Tensor, num_heads: int) -> Tensor:
    if k_pos.shape[0] == 1:
        return k_pos
    return k_pos.repeat_interleave(num_heads // k_pos.shape[0], 0)


def _masked_attention(  # noqa: PLR0913, PLR0917 - the op's schema
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    mask: str,
    scale: float,
    block_order: str = "natural",
    dropout: float = 0.0,
    seed: int = -1,
    softcap: float | None = None,
    relative: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    tile = _build_tile(
        *(q, k, v, q_pos, k_pos, captures, biases),
        mask=mask,
        dropout=dropout,
        seed=seed,
        softcap=softcap,
        relative=relative,
    )
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=tile.dtype)
    top = q.new_full((*q.shape[:-1], 1), -torch.inf, dtype=tile.dtype)
    total = torch.zeros_like(top)
    for i, j in tile.blocks(block_order):
        scores = tile.scores(i, j, scale)
        if scores is not None:
            rows = (out[:, :, i], top[:, :, i], total[:, :, i])
            drop = partial(tile.drop, i=i, j=j)
            _add_keys(*rows, scores.values, v[:, :, j].to(tile.dtype), drop=drop)
    # Rows without a key: total is 0 and log gives the -inf that is meant.
    lse = top.masked_fill_(top == -torch.inf, 0.0) + total.log()
    return out.div_(total.masked_fill_(total == 0, 1.0)), lse.squeeze(-1)


def _add_keys(
    out: Tensor,
    top: Tensor,
    total: Tensor,
    scores: Tensor,
    v: Tensor,
    *,
    drop: Callable[[Tensor], Tensor],
) -> None:
    """Online softmax: add a block of keys to the running results of some rows.

    Args:
        out: ``(B, H, i, E)``, weighted by ``exp(score - top)``; written.
        top: ``(B, H, i, 1)``, the largest score so far; written.
        total: ``(B, H, i, 1)``, the sum of the weights; written.
        scores: ``(B, H, i, j)``; overwritten.
        v: ``(B, G, j, E)``.
        drop: dropout of the weights that values are summed up with.
    """
    new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
    shift = new_top.masked_fill(new_top == -torch.inf, 0.0)
    weights = torch.exp_(scores - shift)
    shrink = torch.exp(top - shift)
    total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
    added = _per_kv_head(drop(weights), v.shape[1]) @ v
    out.mul_(shrink).add_(added.view(out.shape))
    top.copy_(new_top)


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
    biases: Sequence[Tensor],
    *,
    mask: str,
    scale: float,
    block_order: str = "natural",
    dropout: float = 0.0,
    seed: int = -1,
    softcap: float | None = None,
    relative: Sequence[int] = (),
    learned: Sequence[int] = (),
) -> list[Tensor]:
    tile = _build_tile(
        *(q, k, v, q_pos, k_pos, captures, biases),
        mask=mask,
        dropout=dropout,
        seed=seed,
        softcap=softcap,
        relative=relative,
    )
    dq, dk, dv = (x.new_zeros(x.shape, dtype=tile.dtype) for x in (q, k, v))
    d_biases = [tile.biases[n].zeros(tile.dtype) for n in learned]
    G = k.shape[1]
    for i, j, found in _score_gradients(
        tile, grad_out, out, lse, scale=scale, block_order=block_order
    ):
        grad_i = _per_kv_head(grad_out[:, :, i].to(tile.dtype), G)
        dv[:, :, j] += _per_kv_head(tile.drop(found.weights, i, j), G).mT @ grad_i
        for n, total in zip(learned, d_biases, strict=True):
            tile.biases[n].add_gradient(total, found.d_scores, i, j)
        d_products = found.d_scores * scale
        if found.slope is not None:
            d_products *= found.slope
        d_products = _per_kv_head(d_products, G)
        dk[:, :, j] += d_products.mT @ _per_kv_head(q[:, :, i].to(tile.dtype), G)
        added = d_products @ k[:, :, j].to(tile.dtype)
        dq[:, :, i] += added.view(*q.shape[:2], -1, q.shape[-1])
    return [dq, dk, dv, *d_biases]


class _Gradients(NamedTuple):
    """Of a block ``(B, H, i, j)``: weights, gradients of scores, the scores' slope."""

    weights: Tensor
    d_scores: Tensor
    slope: Tensor | None


def _score_gradients(
    tile: _Tile,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    block_order: str,
) -> Iterator[tuple[slice, slice, _Gradients]]:
    """Of each block that is not masked whole: its rows and its gradients."""
    G = tile.k.shape[1]
    for i, j in tile.blocks(block_order):
        scores = tile.scores(i, j, scale, has_slope=True)
        if scores is None:
            continue
        grad_i = grad_out[:, :, i].to(tile.dtype)
        delta = (grad_i * out[:, :, i]).sum(-1, keepdim=True)
        # A row without a key has weights exp(-inf - inf) = 0.
        lse_i = lse[:, :, i, None]
        lse_i = lse_i.masked_fill(lse_i == -torch.inf, torch.inf)
        weights = torch.exp_(scores.values - lse_i)
        grad_i = _per_kv_head(grad_i, G)
        d_weights = (grad_i @ tile.v[:, :, j].to(tile.dtype).mT).view_as(weights)
        d_weights = tile.drop(d_weights, i, j)
        yield i, j, _Gradients(weights, weights * (d_weights - delta), scores.slope)


def _block_gradients(  # noqa: PLR0913, PLR0917 - the op's schema
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    num_blocks: int,
    block: int,
    *,
    mask: str,
    scale: float,
    dropout: float = 0.0,
    seed: int = -1,
    softcap: float | None = None,
    relative: Sequence[int] = (),
) -> Tensor:
    assert q_pos.shape[0] == k_pos.shape[0] == 1, "blocks are of all heads' rows"
    tile = _build_tile(
        *(q, k, v, q_pos, k_pos, captures, biases),
        mask=mask,
        dropout=dropout,
        seed=seed,
        softcap=softcap,
        relative=relative,
    )
    q_block, k_block = (x[0].clamp(min=0) // block for x in (q_pos, k_pos))
    shape = (*q.shape[:2], num_blocks, num_blocks)
    total = q.new_zeros(shape, dtype=tile.dtype)
    for i, j, found in _score_gradients(
        tile, grad_out, out, lse, scale=scale, block_order="natural"
    ):
        d_scores = found.d_scores
        by_key = d_scores.new_zeros((*d_scores.shape[:3], num_blocks))
        by_key.index_add_(3, k_block[j], d_scores)
        total.index_add_(2, q_block[i], by_key)
    return total


for _key in ("CPU", "CUDA"):
    ops.LIBRARY.impl("masked_attention", _masked_attention, _key)
    ops.LIBRARY.impl("masked_attention_backward", _masked_attention_backward, _key)
    ops.LIBRARY.impl("block_gradients", _block_gradients, _key)
