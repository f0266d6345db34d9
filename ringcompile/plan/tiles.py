"""Tiles: which rows of a query shard meet which rows of a KV shard, and how.

A tile is cut into cells of one chunk by one chunk, the predicate decides each cell, and
equal neighbours are joined into few pieces. Invariant: a pair that the mask keeps lies
in exactly one piece; no padded row lies in any, so a pad is never a key.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy
from sympy.logic.boolalg import Boolean

from ringcompile.ir.layout import Edge, Layout
from ringcompile.ir.mask import Mask, causal
from ringcompile.ir.schedule import Coverage, Kernel, Piece, Rows, Tile
from ringcompile.ir.sums import split_terms
from ringcompile.plan.coverage import Span, find_coverage

EMPTY_TILE = Tile(Coverage.EMPTY)


@dataclass(frozen=True, slots=True)
class Strip:
    """The real rows of one chunk of a shard.

    Attributes:
        row: the shard's row of its first position.
        span: its positions.
    """

    row: Edge
    span: Span

    @property
    def rows(self) -> Rows:
        """Its rows in the shard."""
        return Rows(self.row, _add(self.row, self.span.count))

    def part(self, first: int, count: int) -> "Strip":
        """The ``count`` rows from the ``first``-th on."""
        return Strip(_add(self.row, (0, first)), self.span.part(first, count))


@lru_cache(maxsize=4096)
def find_strips(layout: Layout, rank: int, length: int | None) -> tuple[Strip, ...]:
    """The chunks of a shard without their padding; chunks of pads only are left out.

    Args:
        layout: which positions each rank holds.
        rank: whose shard.
        length: tokens S, then all edges are ``(0, rows)``; None for any that needs no
            padding.
    """
    runs = layout.runs(rank)
    if length is None:
        return tuple(
            Strip((i, 0), Span(run.start, run.stride, (1, 0)))
            for i, run in enumerate(runs)
        )
    chunk = layout.chunk_size(length)
    strips = []
    for i, run in enumerate(runs):
        start = run.start[0] * chunk + run.start[1]
        count = min(chunk, -(-(length - start) // run.stride))
        if count > 0:
            strips.append(
                Strip((0, i * chunk), Span((0, start), run.stride, (0, count)))
            )
    return tuple(strips)


@lru_cache(maxsize=65536)
def build_tile(
    mask: Mask, layout: Layout, q_rank: int, kv_rank: int, length: int | None
) -> Tile:
    """Decide the tile of one query shard and one KV shard.

    Args:
        mask: the pairs that count.
        layout: which positions each rank holds.
        q_rank: whose queries.
        kv_rank: whose keys and values.
        length: tokens S; None for a tile that serves every S that needs no padding.

    Raises:
        DependsOnLength: ``length`` is None and no one tile serves every S.
    """
    q = find_strips(layout, q_rank, length)
    kv = find_strips(layout, kv_rank, length)
    if not q or not kv:
        return EMPTY_TILE
    pieces = _whole_causal(mask.keeps, q, kv) if q_rank == kv_rank else None
    if pieces is None:
        cells = [
            cell
            for q_strip in q
            for kv_strip in kv
            for cell in _cut_cell(mask.keeps, q_strip, kv_strip, length)
        ]
        pieces = tuple(_join(_join(cells, along_kv=True), along_kv=False))
    if not pieces:
        return EMPTY_TILE
    chunk = None if length is None else layout.chunk_size(length)
    is_full = [(p.q, p.kv, p.kernel) for p in pieces] == [
        (_hull([s.rows for s in q]), _hull([s.rows for s in kv]), Kernel.FULL)
    ]
    return Tile(
        Coverage.FULL if is_full else Coverage.PARTIAL,
        tuple(
            Piece(_in_chunks(p.q, chunk), _in_chunks(p.kv, chunk), p.kernel)
            for p in pieces
        ),
        _in_chunks(_hull([p.kv for p in pieces]), chunk),
    )


def _whole_causal(
    keeps: Boolean, q: Sequence[Strip], kv: Sequence[Strip]
) -> tuple[Piece, ...] | None:
    """One causal piece, where the own tile of a shard in ascending order is causal."""
    for i, q_strip in enumerate(q):
        for j, kv_strip in enumerate(kv):
            decision = find_coverage(keeps, q_strip.span, kv_strip.span)
            if i == j:
                as_causal = decision.undecided == (causal(),) or (
                    q_strip.span.count == (0, 1) and decision.coverage is Coverage.FULL
                )
            else:
                expected = Coverage.FULL if i > j else Coverage.EMPTY
                as_causal = decision.coverage is expected
            if not as_causal:
                return None
    rows = _hull([s.rows for s in q])
    is_one_row = rows.stop == _add(rows.start, (0, 1))
    return (Piece(rows, rows, Kernel.FULL if is_one_row else Kernel.CAUSAL),)


def _cut_cell(
    keeps: Boolean, q: Strip, kv: Strip, length: int | None
) -> Iterator[Piece]:
    """The pieces of one chunk of queries against one chunk of keys."""
    decision = find_coverage(keeps, q.span, kv.span)
    if decision.coverage is Coverage.EMPTY:
        return
    if decision.coverage is Coverage.FULL:
        yield Piece(q.rows, kv.rows, Kernel.FULL)
        return
    lag = _causal_lag(decision.undecided, q.span, kv.span)
    if lag is not None:
        yield from _cut_causal(q, kv, lag)
        return
    if length is not None:
        q, kv = _trim(keeps, q, kv)
    yield Piece(q.rows, kv.rows, Kernel.MASKED)


def _causal_lag(undecided: tuple[Boolean, ...], q: Span, kv: Span) -> int | None:
    """``lag >= 0`` where query row i sees exactly the KV rows ``j <= i - lag``."""
    if len(undecided) != 1 or not isinstance(undecided[0], sympy.Ge):
        return None
    terms, constant = split_terms(undecided[0].lhs - causal().lhs)
    apart = q.start[1] - kv.start[1] + constant
    if terms or q.stride != kv.stride or q.start[0] != kv.start[0] or apart >= q.stride:
        return None
    return -(apart // q.stride)


def _cut_causal(q: Strip, kv: Strip, lag: int) -> Iterator[Piece]:
    """Query row i sees the KV rows to ``i - lag``: a square, and rows past its end."""
    (chunks, q_rows), (kv_chunks, kv_rows) = q.span.count, kv.span.count
    assert chunks == kv_chunks, "both counts are numbers, or both are one chunk"
    side = (chunks, min(q_rows - lag, kv_rows))
    top = _add(q.row, (0, lag))
    end = _add(top, side)
    square = Rows(kv.row, _add(kv.row, side))
    yield Piece(
        Rows(top, end), square, Kernel.FULL if side == (0, 1) else Kernel.CAUSAL
    )
    if end != q.rows.stop:
        yield Piece(Rows(end, q.rows.stop), square, Kernel.FULL)


def _trim(keeps: Boolean, q: Strip, kv: Strip) -> tuple[Strip, Strip]:
    """Leave out the leading and trailing rows of a cell that meet no other row."""

    def kv_part_is_empty(first: int, count: int) -> bool:
        part = kv.span.part(first, count)
        return find_coverage(keeps, q.span, part).coverage is Coverage.EMPTY

    kv = kv.part(*_find_needed(kv.span.count[1], kv_part_is_empty))

    def q_part_is_empty(first: int, count: int) -> bool:
        part = q.span.part(first, count)
        return find_coverage(keeps, part, kv.span).coverage is Coverage.EMPTY

    return q.part(*_find_needed(q.span.count[1], q_part_is_empty)), kv


def _find_needed(total: int, is_empty: Callable[[int, int], bool]) -> tuple[int, int]:
    """``(first, count)`` without the longest empty head and tail, by bisection."""

    def longest(is_empty_of: Callable[[int], bool]) -> int:
        low, high = 0, total - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if is_empty_of(middle) else (low, middle - 1)
        return low

    head = longest(lambda n: is_empty(0, n)) if is_empty(0, 1) else 0
    tail = longest(lambda n: is_empty(total - n, n)) if is_empty(total - 1, 1) else 0
    tail = min(tail, total - head - 1)
    return head, total - head - tail


def _join(pieces: Sequence[Piece], *, along_kv: bool) -> list[Piece]:
    """Join pieces that touch along one axis and are equal in all else."""
    joined: list[Piece] = []
    for piece in pieces:
        for n, other in enumerate(joined):
            if piece.kernel is other.kernel is not Kernel.CAUSAL:
                if along_kv and piece.q == other.q and piece.kv.start == other.kv.stop:
                    rows = Rows(other.kv.start, piece.kv.stop)
                    joined[n] = Piece(piece.q, rows, piece.kernel)
                    break
                if (
                    not along_kv
                    and piece.kv == other.kv
                    and piece.q.start == other.q.stop
                ):
                    rows = Rows(other.q.start, piece.q.stop)
                    joined[n] = Piece(rows, piece.kv, piece.kernel)
                    break
        else:
            joined.append(piece)
    return joined


# Edges. Those met here keep their order for every c >= 2.


def _add(x: Edge, y: Edge) -> Edge:
    return x[0] + y[0], x[1] + y[1]


def _at_two(edge: Edge) -> int:
    return 2 * edge[0] + edge[1]


def _hull(rows: Sequence[Rows]) -> Rows:
    return Rows(
        min((r.start for r in rows), key=_at_two),
        max((r.stop for r in rows), key=_at_two),
    )


def _in_chunks(rows: Rows, chunk: int | None) -> Rows:
    """Write numbers of rows as chunks and the rest, so that texts read alike."""
    if chunk is None:
        return rows
    return Rows(divmod(rows.start[1], chunk), divmod(rows.stop[1], chunk))
