"""``flex_attention`` written out as scores, masks, softmax and product.

Dynamo makes one call of it, whose ``score_mod`` and ``mask_mod`` are graphs of scalars.
Invariant: the result is that of the fused kernels, rows that see no key included.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ringcompile.autocast import find_autocast_dtype, without_autocast
from ringcompile.passes.scalar_graphs import is_constant, is_identity, run_scalars
from ringcompile.torch_private import flex_is_autocast

NUM_POSITIONS = 4  # b, h, q and k

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class ListedBlocks:
    """The blocks of a mask whose block lists alone say what is kept.

    Attributes:
        lists: number and indices of the partial, then of the full blocks of keys.
        block: queries and keys in a block.
    """

    lists: tuple[Tensor | None, ...]
    block: tuple[int, int]


def write_flex_attention(
    arguments: Sequence[Any], listed: ListedBlocks | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, and the lse and the greatest score of each query, to the base 2.

    Args:
        arguments: of the call that Dynamo makes, its block mask without lists.
        listed: what the block lists say, where ``mask_mod`` does not.

    Source: ``math_attention`` in ``torch/_higher_order_ops/flex_attention.py``.
    """
    q, k, v, score_mod, block_mask, scale, _, *buffers = arguments
    score_buffers, mask_buffers = (*buffers, (), ())[:2]
    device = q.device.type
    dtype = find_autocast_dtype(device)
    if dtype is not None and flex_is_autocast():
        q, k, v = (_lower(x, dtype) for x in (q, k, v))
    with without_autocast(device):
        k, v = (_repeat(x, q) for x in (k, v))
        wide = torch.float64 if q.dtype is torch.float64 else torch.float32
        scores = q.to(wide) @ k.to(wide).mT * scale
        positions = _make_positions(scores)
        if not is_identity(score_mod):
            changed = run_scalars(score_mod, (scores, *positions), score_buffers)
            scores = changed.expand(scores.shape)
        kept = _find_kept(block_mask[-1], listed, positions, mask_buffers)
        if kept is not None:
            scores = torch.where(kept, scores, -math.inf)
        weights = torch.ops.aten._safe_softmax.default(scores, -1)  # noqa: SLF001
        out = weights.to(q.dtype) @ v
        lse = scores.logsumexp(-1) / math.log(2)
        return _lay_out_like(q, out), lse, scores.amax(-1) / math.log(2)


def _lower(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is torch.float64 else x.to(dtype)


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """K or V with as many heads as Q, and its batch size."""
    if x.shape[1] != q.shape[1]:
        x = x.repeat_interleave(q.shape[1] // x.shape[1], 1)
    return x if x.shape[0] == q.shape[0] else x.expand(q.shape[0], -1, -1, -1)


def _make_positions(scores: Tensor) -> list[Tensor]:
    """b, h, q and k of every score, as they broadcast."""
    shape = scores.shape
    return [
        torch.arange(size, device=scores.device).view(
            [-1 if d == dim else 1 for d in range(NUM_POSITIONS)]
        )
        for dim, size in enumerate(shape)
    ]


def _find_kept(
    mask_mod: GraphModule,
    listed: ListedBlocks | None,
    positions: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> Tensor | None:
    """Which scores are kept; None: all of them."""
    if listed is not None:
        return _read_blocks(listed, positions)
    if is_constant(mask_mod, NUM_POSITIONS):
        return None
    return run_scalars(mask_mod, positions, buffers)


def _read_blocks(listed: ListedBlocks, positions: Sequence[Tensor]) -> Tensor:
    b, h, q, k = positions
    table = build_table(listed.lists, -(-k.numel() // listed.block[1]))
    sizes = table.shape
    b, h = (
        x if size == x.numel() else x * 0
        for x, size in zip((b, h), sizes[:2], strict=True)
    )
    at = [b, h, q // listed.block[0], k // listed.block[1]]
    kept: Tensor = aten.index(table, at)
    return kept


def build_table(lists: Sequence[Tensor | None], num_columns: int) -> Tensor:
    """Which blocks are listed, a bool ``(B or 1, H or 1, rows, columns)``."""
    table, *full = build_tables(lists, num_columns)
    return table | full[0] if full else table


def build_tables(lists: Sequence[Tensor | None], num_columns: int) -> list[Tensor]:
    """Which blocks are listed as partial and, if there are such lists, as full."""
    numbers, indices = lists[::2], lists[1::2]
    return [
        _build_table(n, i, num_columns)
        for n, i in zip(numbers, indices, strict=True)
        if n is not None and i is not None
    ]


def _build_table(numbers: Tensor, indices: Tensor, num_columns: int) -> Tensor:
    places = torch.arange(indices.shape[-1], device=indices.device)
    is_given = places < numbers[..., None]
    at = torch.where(is_given, indices, num_columns).long()
    table = is_given.new_zeros((*indices.shape[:-1], num_columns + 1))
    return table.scatter(-1, at, True)[..., :num_columns]


def _lay_out_like(q: Tensor, out: Tensor) -> Tensor:
    """The same in memory as Q, its features last."""
    *lead, features = range(out.ndim)
    order = [*sorted(lead, key=q.stride, reverse=True), features]
    if order == sorted(order):
        return out
    return out.permute(order).contiguous().permute([order.index(d) for d in range(4)])
