"""The ring: one loop for every plan, forward and backward.

At each stage: wait for its KV, start the hops of the next, compute, merge. What is
computed and what travels is the plan's; layouts, windows and dilated patterns differ in
it alone. Invariant: every rank starts the same list of tags, and what it gives needs
every arrival, so that no compiler drops one rank's half of a hop.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringcompile import ops
from ringcompile.lowering.empty_rows import fill_empty_rows
from ringcompile.lowering.hops import Flight, Hops, Phase, keep, touch
from ringcompile.lowering.merge import merge
from ringcompile.lowering.program import (
    PartProgram,
    TileProgram,
    build_program,
    read_plan,
)
from ringcompile.lowering.rows import RowSet, Segments, Size, Values
from ringcompile.lowering.tiles.pieces import attend_piece, piece_gradients


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], *, plan: str
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks.

    Args:
        q: own rows, ``(B, H, T, D)``.
        k: own rows, ``(B, G, T, D)``.
        v: own rows, ``(B, G, T, E)``.
        captures: what the mask reads, full and equal on all ranks.
        plan: ``ir.text.format_plan`` of a ``RankPlan``.

    Returns:
        ``(B, H, T, E)`` in the dtype of ``q``.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):  # as torch's own attention is autocast
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    with torch.autocast(device, enabled=False):
        out, lse = _Ring.apply(plan, q, k, v, *captures)  # type: ignore[no-untyped-call]
        return fill_empty_rows(out, lse, (q, k, v), plan=read_plan(plan))


ops.LIBRARY.impl("ring_attention", ring_attention, "CompositeImplicitAutograd")


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        plan_text: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *captures: Tensor,
    ) -> Values:
        hops = _hops_of(plan_text)
        parts = build_program(plan_text, q, captures)
        out, lse = reduce(_merge, (_attend_part(p, hops, q, (k, v)) for p in parts))
        # Saved, and in this order, hops are not replayed under checkpointing: lse has
        # no reader in forward and would be recomputed, ring and all (FACTS.md 2.3).
        lse = keep(touch(lse, hops.idle))
        out = keep(out.to(q.dtype), [lse])
        ctx.save_for_backward(q, k, v, out, lse, *captures)
        ctx.plan_text = plan_text
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's
        grad_out: Tensor,
        _grad_lse: Tensor,
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *captures = ctx.saved_tensors
        is_needed = ctx.needs_input_grad[1:4]
        # Behind the tangent, KV is not fetched in forward and saved (FACTS.md 2.3).
        hops = _hops_of(ctx.plan_text, after=[grad_out])
        lse = torch.where(lse == -torch.inf, torch.inf, lse)
        shard = _Shard(grad_out.contiguous(), q, k, v, out, lse)
        parts = build_program(ctx.plan_text, q, captures)
        grads = reduce(
            _add,
            (
                _part_gradients(p, hops, shard, returns=any(is_needed[1:]))
                for p in parts
            ),
        )
        dq, dk, dv = (
            touch(grad.to(x.dtype), hops.idle) if needed else None
            for grad, x, needed in zip(grads, (q, k, v), is_needed, strict=True)
        )
        return None, dq, dk, dv, *(None for _ in captures)


@dataclass(frozen=True, slots=True)
class _Shard:
    """What backward reads of this rank's rows; out and lse are merged over all keys."""

    grad_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def _hops_of(plan_text: str, after: Sequence[Tensor] = ()) -> Hops:
    plan = read_plan(plan_text)
    return Hops(plan.group_name, plan.timeout_s, after=after)


def _stages(
    part: PartProgram, hops: Hops, phase: Phase, kv: Values
) -> Iterator[list[tuple[TileProgram, Values]]]:
    """Each stage's tiles with their KV; meanwhile the hops of the next stage fly."""
    flights = [_fetch(part, tile, hops, phase, kv) for tile in part.stages[0]]
    for stage, following in zip(part.stages, (*part.stages[1:], ()), strict=True):
        arrived = [hops.land(flight) for flight in flights]
        flights = [_fetch(part, tile, hops, phase, kv) for tile in following]
        yield list(zip(stage, arrived, strict=True))


def _fetch(
    part: PartProgram, tile: TileProgram, hops: Hops, phase: Phase, kv: Values
) -> Flight:
    """Start the hop that brings a tile's KV; what is here needs none."""
    if tile.is_own:
        return Flight(_take(tile.reads, kv), is_here=True)
    return hops.start(
        part.frame.tag(phase, tile.number),
        _take(tile.sends, kv),
        dst=-1 if tile.sends is None else tile.reader,
        src=-1 if tile.reads is None else tile.owner,
        rows=0 if tile.reads is None else tile.reads.count,
    )


def _take(rows: RowSet | None, xs: Values) -> Values:
    return tuple(x[:, :, :0] if rows is None else rows.take(x) for x in xs)


# ---- forward -------------------------------------------------------------------------


def _attend_part(part: PartProgram, hops: Hops, q: Tensor, kv: Values) -> Values:
    """Out and lse of one part, over all rows of the shard."""
    queries = part.queries.take(q)
    total = part.query_segments(_merge)
    for stage in _stages(part, hops, Phase.FORWARD_KV, kv):
        for tile, tile_kv in stage:
            for piece in tile.pieces:
                total.add(piece.q, attend_piece(part, tile, piece, queries, tile_kv))
    dtype, v = ops.accumulation_dtype(q.dtype), kv[1]

    def nothing(rows: Size) -> Values:
        out = q.new_zeros((*q.shape[:2], rows, v.shape[3]), dtype=dtype)
        return out, q.new_full((*q.shape[:2], rows), -torch.inf, dtype=dtype)

    _, values = part.queries.place(total.join(nothing))
    return values


def _merge(a: Values, b: Values) -> Values:
    return merge((a[0], a[1]), (b[0], b[1]))


# ---- backward ------------------------------------------------------------------------


def _part_gradients(
    part: PartProgram, hops: Hops, shard: _Shard, *, returns: bool
) -> Values:
    """dq, dk and dv of one part, over all rows of the shard.

    ``returns``: whether dKV are wanted, so that each rank sends them to the owner.
    """
    reads = (shard.grad_out, shard.q, shard.out, shard.lse)
    queries = tuple(part.queries.take(x) for x in reads)
    kv = (shard.k, shard.v)
    dq, home = part.query_segments(_add), part.kv_segments(_add)
    under_way: list[tuple[TileProgram, Flight]] = []
    for stage in _stages(part, hops, Phase.BACKWARD_KV, kv):
        landing, under_way = under_way, []
        for tile, tile_kv in stage:
            dkv = _tile_gradients(part, tile, queries, tile_kv, dq)
            if not tile.is_own and returns:
                under_way.append((tile, _return(part, tile, hops, dkv)))
            elif tile.is_own and tile.reads is not None:
                home.add(*tile.reads.place(dkv))
        _land_home(landing, hops, home)
    _land_home(under_way, hops, home)
    _, (dq_shard,) = part.queries.place(dq.join(lambda n: _zeros((shard.q,), n)))
    dk, dv = home.join(lambda n: _zeros(kv, n))
    return dq_shard, dk, dv


def _tile_gradients(
    part: PartProgram, tile: TileProgram, queries: Values, kv: Values, dq: Segments
) -> Values:
    """Add to ``dq`` and give dk and dv of the KV rows that the tile reads."""
    if tile.reads is None:
        return _zeros(kv, 0)
    dkv = part.tile_segments(tile, _add)
    for piece in tile.pieces:
        piece_dq, *piece_dkv = piece_gradients(part, tile, piece, queries, kv)
        dq.add(piece.q, (piece_dq.to(ops.accumulation_dtype(piece_dq.dtype)),))
        dkv.add(
            piece.kv, tuple(x.to(ops.accumulation_dtype(x.dtype)) for x in piece_dkv)
        )
    return dkv.join(lambda n: _zeros(kv, n))


def _return(part: PartProgram, tile: TileProgram, hops: Hops, dkv: Values) -> Flight:
    """Send dKV home to the owner, and expect those of the rank that reads ours."""
    return hops.start(
        part.frame.tag(Phase.BACKWARD_DKV, tile.number),
        dkv,
        dst=-1 if tile.reads is None else tile.owner,
        src=-1 if tile.sends is None else tile.reader,
        rows=0 if tile.sends is None else tile.sends.count,
    )


def _land_home(
    landing: Sequence[tuple[TileProgram, Flight]], hops: Hops, home: Segments
) -> None:
    for tile, flight in landing:
        dkv = hops.land(flight)
        if tile.sends is not None:
            home.add(*tile.sends.place(dkv))


def _zeros(xs: Values, rows: Size) -> Values:
    """That many rows of zeros for each of ``xs``, in the dtype of sums."""
    return tuple(
        x.new_zeros(
            (*x.shape[:2], rows, *x.shape[3:]), dtype=ops.accumulation_dtype(x.dtype)
        )
        for x in xs
    )


def _add(a: Values, b: Values) -> Values:
    return tuple(x + y for x, y in zip(a, b, strict=True))
