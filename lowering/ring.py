"""The ring: one loop for every plan, forward and backward.

At each stage: wait for its KV, start the hops of the next, compute, merge. What is
computed and what travels is the plan's; layouts, windows and dilated patterns differ in
it alone. Autograd and AOTAutograd see one op for forward and one for backward; before
Inductor lowers a graph ``expand`` writes them out. Invariant: every rank starts the
same list of tags.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringcompile import ops
from ringcompile.autocast import find_autocast_dtype, without_autocast
from ringcompile.ir.attention import RankPlan
from ringcompile.lowering.adaptive import choose_blocks
from ringcompile.lowering.bias_sums import BiasSums
from ringcompile.lowering.empty_rows import fill_empty_rows
from ringcompile.lowering.exchange import trade_heads, trade_rows
from ringcompile.lowering.hops import Flight, Hops, Phase, keep
from ringcompile.lowering.merge import merge
from ringcompile.lowering.program import (
    PartProgram,
    TileProgram,
    build_program,
    read_plan,
)
from ringcompile.lowering.ring_shapes import backward_shapes, forward_shapes
from ringcompile.lowering.rows import (
    RowSet,
    Segments,
    Size,
    Values,
    lay_by_token,
)
from ringcompile.lowering.scores import (
    add_sinks,
    find_level,
    read_biases,
    sink_gradient,
    sink_scores,
)
from ringcompile.lowering.tiles.dense import gradient_dtype
from ringcompile.lowering.tiles.pieces import (
    BlockSums,
    attend_piece,
    piece_gradients,
)

_T = TypeVar("_T")


def ring_attention(  # noqa: PLR0913 - the op's schema
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    sinks: Tensor | None = None,
    *,
    plan: str,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks.

    Args:
        q: own rows, ``(B, H, T, D)``.
        k: own rows, ``(B, G, T, D)``; T as many as the plan's keys have.
        v: own rows, ``(B, G, T, E)``.
        captures: what the mask reads, full and equal on all ranks.
        biases: added to scores, as the plan says; those not cut equal on all ranks.
        sinks: ``(H,)``, the score of one more key per head whose value is 0.
        plan: ``ir.text.format_plan`` of a ``RankPlan``.

    Returns:
        ``(B, H, T, E)`` in the dtype of ``q``.
    """
    device = q.device.type
    lowered = find_autocast_dtype(device)
    if lowered is not None:  # as torch's own attention is autocast
        q, k, v = (x.to(lowered) for x in (q, k, v))
    with without_autocast(device):
        q, k, v = trade_rows(q, k, v, plan=plan)
        known, shares = choose_blocks(q, k, captures, plan=plan)
        out, lse = _Ring.apply(plan, shares, q, k, v, sinks, *biases, *known)  # type: ignore[no-untyped-call]
        divisor = read_plan(plan).schedule.mixing.divisor
        out = out if divisor == 1 else out / divisor
        lse = lse if sinks is None else None
        out = fill_empty_rows(out, lse, (q, k, v), biases, plan=read_plan(plan))
        return trade_heads(out, plan=plan)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - the op's tensors
        ctx: Any,  # noqa: ANN401 - autograd's
        plan_text: str,
        shares: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        *rest: Tensor,
    ) -> Values:
        biases, captures = _split(read_plan(plan_text), rest)
        out, lse, *outs = ops.RING_FORWARD(
            q, k, v, captures, biases, sinks, plan=plan_text
        )
        # Were they not kept, checkpointing would run the ring again; for lse alone too,
        # as nothing in forward reads it (FACTS.md 2.3).
        lse = keep(lse)
        outs = [keep(own) for own in outs]
        out = keep(out, [lse, *outs])
        ctx.save_for_backward(q, k, v, sinks, lse, *rest, *(outs or [out]))
        ctx.plan_text = plan_text
        ctx.num_blocks = None if shares is None else shares.shape[-1]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's
        grad_out: Tensor,
        _grad_lse: Tensor,
    ) -> tuple[Tensor | None, ...]:
        wants_shares, *is_needed = ctx.needs_input_grad[1:]
        q, k, v, sinks, lse, *saved = ctx.saved_tensors
        count = len(is_needed) - 4
        rest, outs = saved[:count], saved[count:]
        biases, captures = _split(read_plan(ctx.plan_text), rest)
        needed = is_needed[: 4 + len(biases)]
        found: Iterator[Tensor] = iter(
            ops.RING_BACKWARD(
                *(grad_out, q, k, v, outs, lse, captures, biases, sinks),
                needed=needed,
                num_blocks=ctx.num_blocks if wants_shares else None,
                plan=ctx.plan_text,
            )
        )
        grads = [next(found) if need else None for need in needed]
        d_shares = next(found) if wants_shares else None
        return None, d_shares, *grads, *(None for _ in captures)


def _split(plan: RankPlan, rest: Sequence[_T]) -> tuple[list[_T], list[_T]]:
    """What is of biases and what of captures."""
    count = len(plan.biases)
    return list(rest[:count]), list(rest[count:])


@dataclass(frozen=True, slots=True)
class _Shard:
    """What backward reads of this rank's rows; lse is merged over all keys.

    ``dtype``: what dq, dk and dv are rounded to; None: they are sums to be added to.
    """

    grad_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    dtype: torch.dtype | None


def _stages(
    parts: Sequence[PartProgram], hops: Hops, phase: Phase, kv: Values
) -> Iterator[list[tuple[TileProgram, Values]]]:
    """All parts' stages: tiles with their KV; meanwhile the hops of the next fly.

    Backward has a part's own tile last, so that under it the last dKV fly home; what
    the first stage fetches then starts before the ring does (see ``expand``).
    """
    stages = [(part, x) for part in parts for x in part.order_stages(phase)]
    flights = [_fetch(*stages[0], hops, phase, kv)]
    for (_, stage), following in zip(stages, (*stages[1:], None), strict=True):
        arrived = [
            _land(tile, flight, hops)
            for tile, flight in zip(stage, flights.pop(), strict=True)
        ]
        if following is not None:
            flights.append(_fetch(*following, hops, phase, kv))
        yield list(zip(stage, arrived, strict=True))


def _fetch(
    part: PartProgram,
    stage: Sequence[TileProgram],
    hops: Hops,
    phase: Phase,
    kv: Values,
) -> list[Flight]:
    return [_fetch_tile(part, tile, hops, phase, kv) for tile in stage]


def _fetch_tile(
    part: PartProgram, tile: TileProgram, hops: Hops, phase: Phase, kv: Values
) -> Flight:
    """Start the hop that brings a tile's KV; what is here needs none."""
    if tile.is_own:
        return Flight(_take(tile.reads, kv), is_here=True)
    return hops.start(
        part.frame.tag(phase, tile.number),
        part.pack(tile.sends, _take(tile.sends, kv)),
        dst=-1 if tile.sends is None else part.frame.plan.find_peer(rank=tile.reader),
        src=-1 if tile.reads is None else part.frame.plan.find_peer(rank=tile.owner),
        rows=0 if tile.reads is None else tile.reads.wire_count,
    )


def _land(tile: TileProgram, flight: Flight, hops: Hops) -> Values:
    """A tile's KV, of the rows that it reads."""
    kv = hops.land(flight)
    if tile.is_own or tile.reads is None:
        return kv
    return tuple(map(tile.reads.unpack, kv))


def _take(rows: RowSet | None, xs: Values) -> Values:
    return tuple(x[:, :, :0] if rows is None else rows.take(x) for x in xs)


# ---- forward -------------------------------------------------------------------------


def attend_ring(  # noqa: PLR0913 - the op's schema
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    sinks: Tensor | None,
    *,
    plan: str,
) -> list[Tensor]:
    """Forward of ``ops.RING_FORWARD``: out, lse and maybe each part's own out."""
    record, hops = read_plan(plan), Hops(read_plan(plan))
    k, v = k.contiguous(), v.contiguous()  # one copy for all hops
    own_outs: list[Tensor] = []

    is_last = len(record.schedule.parts) == 1 and sinks is None
    dtype = q.dtype if is_last else None

    def attend(part: PartProgram) -> Values:
        mine = islice(stages, len(part.stages))
        out, lse = _attend_part(part, mine, q, (k, v), dtype)
        if record.schedule.mixing.is_detached:
            own_outs.append(out.to(q.dtype, copy=True))
        return part.queries.place((out, lse))[1]

    level = find_level(record, biases, captures, q.shape[2])
    read = read_biases(record, biases, level)
    parts = build_program(plan, q, v, captures, read)
    stages = _stages(parts, hops, Phase.FORWARD_KV, (k, v))
    out, lse = reduce(_merge, map(attend, parts))
    if sinks is not None:
        assert not own_outs, "detached weights say nothing of a sink's"
        out, lse = add_sinks(out, lse, sink_scores(sinks, level, lse))
    own_outs = [own.contiguous() for own in own_outs]
    return [lay_by_token(out.to(q.dtype)), lse.contiguous(), *own_outs]


def _attend_part(
    part: PartProgram,
    stages: Iterable[list[tuple[TileProgram, Values]]],
    q: Tensor,
    kv: Values,
    dtype: torch.dtype | None,
) -> Values:
    """Out, rounded to ``dtype``, and lse of one part, over the queries in it."""
    queries = part.queries.take(q)
    total = part.query_segments(_merge)
    for tile, tile_kv in chain.from_iterable(stages):
        for piece in tile.pieces:
            total.add(piece.q, attend_piece(part, tile, piece, queries, tile_kv))
    wide, v = ops.accumulation_dtype(q.dtype), kv[1]

    def nothing(rows: Size) -> Values:
        out = q.new_zeros((*q.shape[:2], rows, v.shape[3]), dtype=wide)
        return out, q.new_full((*q.shape[:2], rows), -torch.inf, dtype=wide)

    return total.join(nothing, dtype=dtype)


def _merge(a: Values, b: Values) -> Values:
    return merge((a[0], a[1]), (b[0], b[1]))


# ---- backward ------------------------------------------------------------------------


def find_ring_gradients(  # noqa: PLR0913, PLR0917 - the op's schema
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    outs: Sequence[Tensor],
    lse: Tensor,
    captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    sinks: Tensor | None,
    *,
    needed: Sequence[bool],
    num_blocks: Size | None,
    plan: str,
) -> list[Tensor]:
    """Backward, ``ops.RING_BACKWARD``: the gradients that are needed."""
    record, hops = read_plan(plan), Hops(read_plan(plan))
    k, v = k.contiguous(), v.contiguous()
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    dtype = q.dtype if len(record.schedule.parts) == 1 else None
    shard = _Shard(lay_by_token(grad_out), q, k, v, lse, dtype)  # as out lies
    level = find_level(record, biases, captures, q.shape[2])
    read = read_biases(record, biases, level, needed[4:])
    parts = build_program(plan, q, v, captures, read)
    of_blocks = None if num_blocks is None else BlockSums(num_blocks)
    of_parts = list(outs)
    if not record.schedule.mixing.is_detached:
        of_parts = [part.queries.take(outs[0]) for part in parts]
    stages = _stages(parts, hops, Phase.BACKWARD_KV, (k, v))
    dq, dk, dv, *d_biases = reduce(
        _add,
        (
            _part_gradients(
                *(part, islice(stages, len(part.stages)), hops, shard, out, of_blocks),
                returns=any(needed[1:3]),
            )
            for part, out in zip(parts, of_parts, strict=True)
        ),
    )
    found = [
        lay_by_token(grad.to(x.dtype))
        for grad, x, need in zip((dq, dk, dv), (q, k, v), needed, strict=False)
        if need
    ]
    if needed[3]:
        assert sinks is not None, "sinks that want a gradient"
        scores = sink_scores(sinks, level, lse)
        d_sinks = sink_gradient(grad_out, outs[0], lse, scores)
        found.append(d_sinks.to(sinks.dtype))
    learned = [x for x, need in zip(biases, needed[4:], strict=True) if need]
    found += [
        total.to(x.dtype).contiguous()
        for total, x in zip(d_biases, learned, strict=True)
    ]
    if of_blocks is not None:
        found.append(of_blocks.total().contiguous())
    return found


def _part_gradients(  # noqa: PLR0913 - what a backward reads
    part: PartProgram,
    stages: Iterable[list[tuple[TileProgram, Values]]],
    hops: Hops,
    shard: _Shard,
    out: Tensor,
    of_blocks: BlockSums | None,
    *,
    returns: bool,
) -> Values:
    """dq, dk, dv and those of biases of one part, over all rows of the shard.

    ``out``: the part's rows of the output whose weights pass gradients on.
    ``of_blocks``: where gradients of blocks' scores are summed up, if those learn.
    ``returns``: whether dKV are wanted, so that each rank sends them to the owner.
    """
    grad_out, q, lse = map(part.queries.take, (shard.grad_out, shard.q, shard.lse))
    queries = (grad_out, q, out, lse)
    kv = (shard.k, shard.v)
    of_biases = BiasSums(part, ops.accumulation_dtype(q.dtype))
    dq, home = part.query_segments(_add), part.kv_segments(_add)
    landing: list[tuple[TileProgram, Flight]] = []
    under_way: list[tuple[TileProgram, Flight]] = []
    for stage in stages:
        _land_home(landing, hops, home)
        landing, under_way = under_way, []
        for tile, tile_kv in stage:
            dkv = tuple(x[:, :, :0].to(_dkv_dtype(tile, kv)) for x in kv)
            if tile.reads is not None:
                dkv = _tile_gradients(*(part, tile, queries, tile_kv), dq, of_biases)
            if of_blocks is not None:
                of_blocks.add(part, tile, queries, tile_kv)
            if not tile.is_own and returns:
                under_way.append((tile, _return(part, tile, hops, dkv)))
            elif tile.is_own and tile.reads is not None:
                home.add(*tile.reads.place(dkv))
    # Before the last waits for dKV.
    own_dq = dq.join(lambda n: _zeros((shard.q,), n), dtype=shard.dtype)
    _, (dq_shard,) = part.queries.place(own_dq)
    _land_home([*landing, *under_way], hops, home)
    dk, dv = home.join(lambda n: _zeros(kv, n), dtype=shard.dtype)
    return dq_shard, dk, dv, *of_biases.place()


def _tile_gradients(
    part: PartProgram,
    tile: TileProgram,
    queries: Values,
    kv: Values,
    dq: Segments,
    of_biases: BiasSums,
) -> Values:
    """Add to ``dq`` and ``of_biases``; give dk and dv of the KV rows the tile reads."""
    dkv, dtype = part.tile_segments(tile, _add), _dkv_dtype(tile, kv)
    for piece in tile.pieces:
        piece_dq, *piece_dkv = piece_gradients(
            *(part, tile, piece, queries, kv), of_biases
        )
        dq.add(piece.q, (piece_dq.to(ops.accumulation_dtype(piece_dq.dtype)),))
        dkv.add(piece.kv, tuple(x.to(dtype) for x in piece_dkv))
    return dkv.join(lambda n: _zeros(kv, n))


def _dkv_dtype(tile: TileProgram, kv: Values) -> torch.dtype:
    """What dKV of a tile are summed in, and travel in: alike on all ranks."""
    if tile.is_one_call and not tile.is_own:
        return gradient_dtype(*kv)
    return ops.accumulation_dtype(kv[0].dtype)


def _return(part: PartProgram, tile: TileProgram, hops: Hops, dkv: Values) -> Flight:
    """Send dKV home to the owner, and expect those of the rank that reads ours."""
    return hops.start(
        part.frame.tag(Phase.BACKWARD_DKV, tile.number),
        part.pack(tile.reads, dkv),
        dst=-1 if tile.reads is None else part.frame.plan.find_peer(rank=tile.owner),
        src=-1 if tile.sends is None else part.frame.plan.find_peer(rank=tile.reader),
        rows=0 if tile.sends is None else tile.sends.wire_count,
    )


def _land_home(
    landing: Sequence[tuple[TileProgram, Flight]], hops: Hops, home: Segments
) -> None:
    for tile, flight in landing:
        dkv = hops.land(flight)
        if tile.sends is not None:
            wide = (x.to(ops.accumulation_dtype(x.dtype)) for x in dkv)
            home.add(*tile.sends.place(tuple(map(tile.sends.unpack, wide))))


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


# ---- ops -----------------------------------------------------------------------------


ops.LIBRARY.impl("ring_attention", ring_attention, "CompositeImplicitAutograd")
for _name, _kernel, _shapes in (
    ("ring_forward", attend_ring, forward_shapes),
    ("ring_backward", find_ring_gradients, backward_shapes),
):
    ops.LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ringcompile::{_name}", _shapes, lib=ops.LIBRARY)
