"""A plan as this rank runs it: which rows go to whom, and which kernels are called.

What differs between plans is decided here, as data; the ring loop only walks it.
Invariant: both ends of a hop count the same rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from ringcompile.ir.attention import RankPlan
from ringcompile.ir.layout import Layout, Side
from ringcompile.ir.schedule import Kernel, Part, Piece, Rows, Selection, Step, Tile
from ringcompile.ir.text import format_mask, parse_plan
from ringcompile.lowering.calls import Call
from ringcompile.lowering.cut_bands import ANY_WIDTH, LEAST_WINDOW, cut_window
from ringcompile.lowering.cut_masks import cut_masked
from ringcompile.lowering.cut_selected import Compact, cut_selected
from ringcompile.lowering.hops import Phase, Tag
from ringcompile.lowering.orders import find_positions
from ringcompile.lowering.rows import (
    RowSet,
    Segments,
    SelectedSpan,
    Size,
    Span,
    Values,
    shift,
)
from ringcompile.lowering.scores import PartBias
from ringcompile.lowering.selected import TableSpec, find_runs, find_selected
from ringcompile.torch_private import FLEX_BLOCK, has_flex_kernel, outside_tracing

read_plan = lru_cache(maxsize=1024)(parse_plan)


@dataclass(frozen=True, slots=True)
class TileProgram:
    """One step on this rank.

    Attributes:
        is_own: whether the KV are this rank's own.
        number: the step's number over all parts.
        owner: rank whose KV this rank reads.
        reader: rank that reads this rank's KV.
        reads: rows of the owner's shard that this rank reads; None if none.
        sends: rows of this rank's shard that the reader reads; None if none.
        pieces: the kernel calls; their KV rows are counted from the first row read.
        needs: runs of the owner's rows that are read, where no rows are selected.
        is_one_call: whether on every rank at most one kernel without a mask computes
            the step, so that its gradients travel as they are: no sum is rounded.
    """

    is_own: bool
    number: int
    owner: int
    reader: int
    reads: RowSet | None
    sends: RowSet | None
    pieces: tuple[Piece, ...]
    needs: tuple[Rows, ...]
    is_one_call: bool


@dataclass(frozen=True, slots=True)
class PartProgram:
    """One part on this rank.

    Attributes:
        queries: rows of this rank's shard that take part; pieces count from the first.
        stages: the steps, grouped.
        mask: which pairs count, as text.
        captures: what the mask reads.
        frame: the shards that all of these rows lie in.
        is_selected: whether heads may have rows of their own.
        biases: what is added to scores, of the part's queries.
    """

    queries: RowSet
    stages: tuple[tuple[TileProgram, ...], ...]
    mask: str
    captures: tuple[Tensor, ...]
    frame: "Frame"
    is_selected: bool
    biases: tuple[PartBias, ...] = ()

    @property
    def tiles(self) -> Iterator[TileProgram]:
        """All steps in order."""
        return (tile for stage in self.stages for tile in stage)

    def order_stages(self, phase: Phase) -> Sequence[tuple[TileProgram, ...]]:
        """The stages as they are computed: the own tile first, in backward last."""
        first, *others = self.stages
        is_last = phase is Phase.BACKWARD_KV and all(tile.is_own for tile in first)
        return (*others, first) if is_last else self.stages

    def mask_of(self, piece: Piece) -> str:
        """Which pairs of a piece count, as text."""
        return (piece.mask if isinstance(piece, Call) else None) or self.mask

    def pack(self, rows: RowSet | None, values: Values) -> Values:
        """``values`` of ``rows`` as they travel; of None there are none."""
        pack = self.queries.pack_none if rows is None else rows.pack
        return tuple(map(pack, values))

    def query_segments(self, combine: Callable[[Values, Values], Values]) -> Segments:
        """Running values over the part's queries."""
        spans = [self.queries.own_rows]
        spans += [piece.q for tile in self.tiles for piece in tile.pieces]
        return Segments(spans, self.frame.chunk, combine=combine)

    def tile_segments(
        self, tile: TileProgram, combine: Callable[[Values, Values], Values]
    ) -> Segments:
        """Running values over the KV rows that a tile reads."""
        assert tile.reads is not None, "an empty tile has no gradients"
        spans = [tile.reads.own_rows, *(piece.kv for piece in tile.pieces)]
        return Segments(spans, self.frame.kv_chunk, combine=combine)

    def kv_segments(self, combine: Callable[[Values, Values], Values]) -> Segments:
        """Running values over this rank's KV, cut where readers' rows are."""
        spans = [self.frame.kv_shard.rows]
        for tile in self.tiles:
            mine = tile.reads if tile.is_own else tile.sends
            if mine is not None:
                spans.append(mine.shard_rows)
        return Segments(spans, self.frame.kv_chunk, combine=combine)


@dataclass(frozen=True, slots=True)
class Frame:
    """The shards of one call.

    Attributes:
        plan: what all ranks do.
        chunk: tokens in a chunk of queries.
        kv_chunk: tokens in a chunk of keys.
        device: where the shards lie.
        least_window: rows of a window below which one kernel with a mask is faster.
        fills_blocks: whether chunks are multiples of ``FLEX_BLOCK`` rows.
    """

    plan: RankPlan
    chunk: Size
    kv_chunk: Size
    device: torch.device
    least_window: int
    fills_blocks: bool

    @property
    def shard(self) -> Span:
        """All rows of a shard of queries."""
        chunks = self.plan.schedule.layout.chunks_per_rank
        return Span(Rows((0, 0), (chunks, 0)), self.chunk)

    @property
    def kv_shard(self) -> Span:
        """All rows of a shard of keys."""
        chunks = self.plan.schedule.kv_side.layout.chunks_per_rank
        return Span(Rows((0, 0), (chunks, 0)), self.kv_chunk)

    def tag(self, phase: Phase, step: int) -> Tag:
        """The tag of a step's hop."""
        return Tag(self.plan.index, phase, step)

    def q_positions(self) -> Tensor:
        """Global positions of this rank's queries, ``(T,)``; pads are past the end."""
        side = self.plan.schedule.q_side
        return self._positions(side, self.plan.rank, self.chunk)

    def kv_positions(self, rank: int) -> Tensor:
        """Global positions of a rank's keys, ``(T,)``; pads are past the end."""
        return self._positions(self.plan.schedule.kv_side, rank, self.kv_chunk)

    def _positions(self, side: Side, rank: int, chunk: Size) -> Tensor:
        return find_positions(
            side.layout, rank, chunk, length=side.length, device=self.device
        )


def _guard_blocks(chunk: Size, layout: Layout) -> bool:
    """Whether a chunk is a number of whole blocks; guards all that pieces ask of rows.

    Of an open length a piece asks whether it has one block or more. It has some chunks
    of a shard, or a row less where a striped rank lies ahead of another: which of them
    differs by rank, so that every rank asks it of all.
    """
    sizes = [count * chunk for count in range(1, layout.chunks_per_rank + 1)]
    if layout.name == "striped":
        sizes.append(chunk - 1)
    for size in sizes:
        bool(size <= FLEX_BLOCK)
    return bool(chunk % FLEX_BLOCK == 0)


def build_program(
    plan_text: str,
    q: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    biases: Sequence[PartBias] = (),
) -> tuple[PartProgram, ...]:
    """Read a plan for shards like ``q`` and ``v``, ``(B, H, T, D)``."""
    plan = read_plan(plan_text)
    schedule = plan.schedule
    chunk = _chunk_size(plan, schedule.q_side, q.shape[2])
    kv_chunk = _chunk_size(plan, schedule.kv_side, v.shape[2])
    num_heads, is_flex, fills_blocks = q.shape[1], has_flex_kernel(q, v), False
    if plan.kernel == "flex" or schedule.has_masked_tiles:
        # Guards, the same on all ranks: else one compiles anew while others run.
        num_heads = int(num_heads)
        if is_flex:
            sides = ((chunk, schedule.q_side), (kv_chunk, schedule.kv_side))
            fills = [_guard_blocks(n, side.layout) for n, side in sides]
            fills_blocks = all(fills)
    frame = Frame(
        plan,
        chunk=chunk,
        kv_chunk=kv_chunk,
        device=q.device,
        least_window=LEAST_WINDOW[is_flex],
        fills_blocks=fills_blocks,
    )
    parts, number = [], 0
    for part in plan.schedule.parts:
        queries = _find_queries(part, frame)
        stages = []
        for stage in part.stages:
            tiles = (
                _build_tile(step, part, queries, num_heads, frame) for step in stage
            )
            stages.append(
                tuple(replace(t, number=n) for n, t in enumerate(tiles, number))
            )
            number += len(stage)
        mask, is_selected = format_mask(part.mask), part.selection is not None
        own = (x.take(queries, num_heads, by_head=is_selected) for x in biases)
        parts.append(
            PartProgram(
                *(queries, tuple(stages), mask, tuple(captures), frame),
                is_selected=is_selected,
                biases=tuple(own),
            )
        )
    return tuple(parts)


def _chunk_size(plan: RankPlan, side: Side, rows: Size) -> Size:
    if side.length is None:
        return rows // side.layout.chunks_per_rank
    expected = side.layout.shard_size(side.length)
    assert rows == expected, f"{rows} rows on rank {plan.rank}, planned for {expected}"
    return side.layout.chunk_size(side.length)


def _build_tile(
    step: Step, part: Part, queries: RowSet, num_heads: int, frame: Frame
) -> TileProgram:
    rank, cp_size = frame.plan.rank, frame.plan.schedule.cp_size
    owner, reader = (rank - step.shift) % cp_size, (rank + step.shift) % cp_size
    mine = step.tiles[rank]
    reads = _find_kv(part, frame, (owner, rank), mine.needs)
    pieces: tuple[Piece, ...] = ()
    if reads is not None and part.selection is not None:
        pieces = _cut_selected(part, part.selection, frame, owner)
    elif reads is not None:
        cut = _cut_pieces(part, mine, num_heads, frame, owner)
        if isinstance(reads, Span):
            first = reads.rows.start
            pieces = tuple(replace(p, kv=shift(p.kv, first)) for p in cut)
        else:
            pieces = _close_up(cut, mine.needs, cast("int", frame.kv_chunk))
    return TileProgram(
        is_own=step.shift == 0,
        number=0,
        owner=owner,
        reader=reader,
        reads=reads,
        sends=_find_kv(part, frame, (rank, reader), step.tiles[reader].needs),
        pieces=pieces,
        needs=mine.needs,
        is_one_call=frame.plan.takes_dense_kernels and part.is_one_call(step),
    )


def _cut_pieces(
    part: Part, tile: Tile, num_heads: int, frame: Frame, owner: int
) -> Iterator[Piece]:
    """The pieces, what of them needs no mask as calls without one.

    Where all kernels have a mask only classes of rows are told apart.
    """
    plan = frame.plan
    sides = plan.schedule.q_side, plan.schedule.kv_side
    may_cut = (
        plan.is_dense
        and plan.block_order == "natural"
        and part.mask.choice is None
        and None not in {side.length for side in sides}
    )
    for piece in tile.pieces:
        if not may_cut or piece.kernel is not Kernel.MASKED:
            yield piece
            continue
        with outside_tracing():  # tables of a mask are tensors
            where = sides, (plan.rank, owner)
            if plan.takes_dense_kernels:
                calls = cut_masked(
                    *(piece, part.mask, num_heads, *where),
                    least_width=frame.least_window,
                )
            else:
                classes = cut_window(
                    piece, part.mask.keeps, *where, least_width=ANY_WIDTH
                )
                calls = classes or (piece,)
        yield from calls


def _close_up(
    pieces: Iterable[Piece], needs: Sequence[Rows], chunk: int
) -> tuple[Piece, ...]:
    """Pieces over the needed rows laid end to end; those that then touch join."""
    runs = [run.resolve(chunk) for run in needs]

    def count_before(row: int) -> int:
        return sum(min(max(row - start, 0), stop - start) for start, stop in runs)

    closed: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: p.kv.resolve(chunk)):
        start, stop = map(count_before, piece.kv.resolve(chunk))
        for n, other in enumerate(closed):
            touches = other.q == piece.q and other.kv.stop == (0, start)
            alike = type(other) is type(piece) is Piece and other.kernel is piece.kernel
            if touches and alike and piece.kernel is not Kernel.CAUSAL:
                start = other.kv.start[1]
                del closed[n]
                break
        closed.append(replace(piece, kv=Rows((0, start), (0, stop))))
    return tuple(closed)


def _find_queries(part: Part, frame: Frame) -> RowSet:
    if part.selection is None:
        return frame.shard
    return _find_selected(part.selection, frame, frame.plan.rank, reader=None)


def _find_kv(
    part: Part, frame: Frame, ranks: tuple[int, int], needs: Sequence[Rows]
) -> RowSet | None:
    """The rows that travel from one rank to another, of those that a tile needs."""
    if not needs:
        return None
    if part.selection is None and len(needs) == 1:
        return Span(needs[0], frame.kv_chunk)
    if part.selection is None:
        layout = frame.plan.schedule.kv_side.layout
        chunk = cast("int", frame.kv_chunk)
        return find_runs(needs, chunk, layout, frame.device)
    return _find_selected(part.selection, frame, ranks[0], reader=ranks[1])


def _cut_selected(
    part: Part, selection: Selection, frame: Frame, owner: int
) -> tuple[Piece, ...]:
    schedule, rank = frame.plan.schedule, frame.plan.rank
    assert schedule.length is not None, "dilated parts are planned for a known length"
    place = (selection, schedule.layout, schedule.length)
    at = Compact(
        TableSpec(*place, rank, reader=None).positions(),
        TableSpec(*place, owner, reader=rank).positions(),
    )
    with outside_tracing():  # it computes with tensors
        calls = cut_selected(format_mask(part.mask), selection, at)
    if frame.plan.is_dense:
        return calls
    # Kernels with a mask take whole rows of all heads.
    return tuple(Piece(call.q, call.kv, Kernel.MASKED) for call in calls)


def _find_selected(
    selection: Selection, frame: Frame, rank: int, *, reader: int | None
) -> RowSet:
    schedule = frame.plan.schedule
    assert schedule.length is not None, "dilated parts are planned for a known length"
    spec = TableSpec(selection, schedule.layout, schedule.length, rank, reader)
    run = spec.find_run()
    # Results of queries are placed over the whole shard.
    if run is not None and (reader is not None or run == (0, frame.shard.count)):
        rows = Rows((0, run[0]), (0, run[1]))
        return SelectedSpan(rows, frame.chunk, selection.num_kv_heads)
    return find_selected(spec, frame.device)
