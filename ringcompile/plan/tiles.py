"""Tiles: which rows of a query shard meet which rows of a KV shard, and how.

A tile is cut into cells of one chunk by one chunk, the predicate decides each cell, and
equal neighbours are joined into few pieces. Rows in the order of a curve are no run: of
a part of them the predicate is asked about all positions between the first and the
last, the parts being small where the curve turns often. Invariant: a pair that the mask
keeps lies in exactly one piece; no padded row lies in any, so a pad is never a key.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy
from sympy.logic.boolalg import Boolean

from ringcompile.ir.layout import Edge, Layout, Side
from ringcompile.ir.mask import TRUE, K, Mask, Q, causal, has_captures, is_capture
from ringcompile.ir.schedule import Coverage, Kernel, Piece, Rows, Tile
from ringcompile.ir.sums import split_floor, split_terms
from ringcompile.plan.coverage import DependsOnLength, Span, find_coverage

EMPTY_TILE = Tile(Coverage.EMPTY)
_GRAIN, _LEAST_GRAIN = 64, 8
_STRIPS = 4  # of a shard without runs: more would be more kernel calls
_MOST_RUNS = 32  # of KV rows that a strip without runs is cut into
_FINEST = 128
"""The part of a strip below which a mask without blocks is not asked where it has gaps.

Its ends are known to the row; of a million tokens, striped over 16 ranks, a dilated
window took a minute to plan down to runs of 64."""


@dataclass(frozen=True, slots=True)
class Strip:
    """The real rows of one chunk of a shard, or of a part of it.

    Attributes:
        row: the shard's row of its first position.
        span: its positions; without a run all from the least to the greatest.
        order: without a run, the position of each row.
    """

    row: Edge
    span: Span
    order: tuple[int, ...] | None = None

    @classmethod
    def of_order(cls, row: Edge, order: tuple[int, ...]) -> "Strip":
        """A strip of positions that are no run."""
        least, greatest = min(order), max(order)
        return cls(row, Span((0, least), 1, (0, greatest - least + 1)), order)

    @property
    def count(self) -> Edge:
        """How many rows it has."""
        return self.span.count if self.order is None else (0, len(self.order))

    @property
    def rows(self) -> Rows:
        """Its rows in the shard."""
        return Rows(self.row, _add(self.row, self.count))

    def part(self, first: int, count: int) -> "Strip":
        """The ``count`` rows from the ``first``-th on."""
        row = _add(self.row, (0, first))
        if self.order is not None:
            return Strip.of_order(row, self.order[first : first + count])
        return Strip(row, self.span.part(first, count))


@lru_cache(maxsize=4096)
def find_strips(layout: Layout, rank: int, length: int | None) -> tuple[Strip, ...]:
    """The chunks of a shard without their padding; chunks of pads only are left out.

    Args:
        layout: which positions each rank holds.
        rank: whose shard.
        length: tokens S, then all edges are ``(0, rows)``; None for any that needs no
            padding.

    Raises:
        DependsOnLength: ``length`` is None and the layout has no runs.
    """
    if not layout.has_runs:
        return _find_order_strips(layout, rank, length)
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


def find_parts(side: Side, rank: int, rows: tuple[int, int]) -> list[Strip]:
    """A range of rows of a shard, padding left out."""
    parts = []
    for strip in find_strips(side.layout, rank, side.length):
        first = max(rows[0] - strip.row[1], 0)
        stop = min(rows[1] - strip.row[1], strip.count[1])
        if stop > first:
            parts.append(strip.part(first, stop - first))
    return parts


def _find_order_strips(
    layout: Layout, rank: int, length: int | None
) -> tuple[Strip, ...]:
    """Equal parts of a shard along its curve: parts of it lie close together."""
    if length is None:
        msg = f"rows in {layout.name} order"
        raise DependsOnLength(msg)
    order = tuple(p for p in layout.positions(rank, length) if p < length)
    size = max(-(-layout.chunk_size(length) // _STRIPS), _LEAST_GRAIN)
    starts = range(0, len(order), size)
    return tuple(Strip.of_order((0, n), order[n : n + size]) for n in starts)


@lru_cache(maxsize=65536)
def build_tile(
    mask: Mask,
    layout: Layout,
    q_rank: int,
    kv_rank: int,
    length: int | None,
    keys: Side | None = None,
) -> Tile:
    """Decide the tile of one query shard and one KV shard.

    Args:
        mask: the pairs that count.
        layout: which positions each rank holds.
        q_rank: whose queries.
        kv_rank: whose keys and values.
        length: tokens S; None for a tile that serves every S that needs no padding.
        keys: where keys lie; None: as the queries do.

    Raises:
        DependsOnLength: a length is None and no one tile serves every S.
    """
    q_side = Side(layout, length)
    kv_side = keys or q_side
    if keys is not None:
        _check_apart(mask.keeps, q_side, keys)
    q = find_strips(layout, q_rank, length)
    kv = find_strips(kv_side.layout, kv_rank, kv_side.length)
    if not q or not kv:
        return EMPTY_TILE
    pieces = None
    has_runs = layout.has_runs and kv_side.layout.has_runs
    if has_runs and keys is None and q_rank == kv_rank:
        pieces = _whole_causal(mask.keeps, q, kv)
    if pieces is None:
        cut = _cut_runs if has_runs else _cut_curves
        known = None if kv_side.length is None else length
        cells = list(cut(mask.keeps, q, kv, known))
        pieces = tuple(_join(_join(cells, along_kv=True), along_kv=False))
    if not pieces:
        return EMPTY_TILE
    is_full = [(p.q, p.kv, p.kernel) for p in pieces] == [
        (_hull([s.rows for s in q]), _hull([s.rows for s in kv]), Kernel.FULL)
    ]
    return Tile(
        Coverage.FULL if is_full else Coverage.PARTIAL,
        tuple(
            Piece(
                _in_chunks(p.q, q_side.chunk), _in_chunks(p.kv, kv_side.chunk), p.kernel
            )
            for p in pieces
        ),
        tuple(
            _in_chunks(rows, kv_side.chunk)
            for rows in _find_needs(pieces, kv_side.length)
        ),
    )


def _check_apart(keeps: Boolean, q: Side, kv: Side) -> None:
    """Two sequences, one open: their chunk lengths can't be compared, nor positions.

    What reads positions of one of them alone is affine in that one's chunk length.
    """
    if None not in (q.length, kv.length):
        return
    if not (q.layout.has_runs and kv.layout.has_runs) or _compares_positions(keeps):
        msg = f"mask {keeps} on queries of {q} and keys of {kv}"
        raise DependsOnLength(msg)


@lru_cache(maxsize=1024)
def _compares_positions(keeps: Boolean) -> bool:
    """Whether an atom reads both positions, but within what captures decide."""
    reads = filter(is_capture, keeps.atoms(sympy.Function))
    nothing = dict.fromkeys(reads, sympy.S.Zero)
    return any(
        {Q, K} <= atom.lhs.xreplace(nothing).free_symbols
        for atom in keeps.atoms(sympy.core.relational.Relational)
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


def _cut_curves(
    keeps: Boolean, q: Sequence[Strip], kv: Sequence[Strip], _length: int | None
) -> Iterator[Piece]:
    """The pieces of all cells of strips without runs.

    Queries that see a part of a KV strip share the runs of it, so that pieces join.
    """
    for kv_strip in kv:
        undecided = []
        for q_strip in q:
            coverage = find_coverage(keeps, q_strip.span, kv_strip.span).coverage
            if coverage is Coverage.FULL:
                yield Piece(q_strip.rows, kv_strip.rows, Kernel.FULL)
            elif coverage is Coverage.PARTIAL:
                undecided.append(q_strip)
        spans = [strip.span for strip in undecided]
        for run in _find_runs(_drop_captures(keeps), spans, kv_strip):
            rows = kv_strip.part(*run).rows
            yield from (Piece(s.rows, rows, Kernel.MASKED) for s in undecided)


def _cut_runs(
    keeps: Boolean, q: Sequence[Strip], kv: Sequence[Strip], length: int | None
) -> Iterator[Piece]:
    """The pieces of all cells of strips that are runs."""
    for q_strip in q:
        for kv_strip in kv:
            yield from _cut_cell(keeps, q_strip, kv_strip, length)


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
    if length is None:
        yield Piece(q.rows, kv.rows, Kernel.MASKED)
        return
    q, kv = _trim(keeps, q, kv)
    for first, count in _find_runs(_drop_captures(keeps), [q.span], kv):
        yield Piece(q.rows, kv.part(first, count).rows, Kernel.MASKED)


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


def _find_runs(
    keeps: Boolean, queries: Sequence[Span], kv: Strip
) -> list[tuple[int, int]]:
    """``(first, count)`` of runs of KV rows outside of which no query sees any."""
    grain = _find_grain(keeps) or max(_GRAIN, kv.count[1] * kv.span.stride // _FINEST)
    runs: list[tuple[int, int]] = []
    boxes = [(0, kv.count[1])]
    while boxes:
        first, count = boxes.pop()
        part = kv.part(first, count).span
        found = {find_coverage(keeps, q, part).coverage for q in queries}
        half = _find_middle(kv, first, count, grain)
        if Coverage.FULL not in found and Coverage.PARTIAL in found and half:
            boxes += [(first + half, count - half), (first, half)]
        elif found - {Coverage.EMPTY}:
            if runs and sum(runs[-1]) == first:
                first, count = runs[-1][0], runs.pop()[1] + count
            runs.append((first, count))
    return runs


@lru_cache(maxsize=1024)
def _find_grain(keeps: Boolean) -> int | None:
    """Tokens in the blocks that a mask is made of; None: of none."""
    sizes = [split_floor(f)[1] for f in keeps.atoms(sympy.floor)]
    blocks = [n for n in sizes if n > 1]
    return max(_LEAST_GRAIN, min(blocks)) if blocks else None


def _find_middle(kv: Strip, first: int, count: int, grain: int) -> int:
    """Rows before the border of blocks that is nearest to the middle; 0: none is."""
    if kv.order is not None:
        least = max(_LEAST_GRAIN, len(kv.order) // _MOST_RUNS)
        return count // 2 if count > least else 0
    stride = kv.span.stride
    start = kv.span.start[1] + first * stride
    border = (start + count * stride // 2 + grain // 2) // grain * grain
    for at in (border, border - grain, border + grain):
        rows = -(-(at - start) // stride)
        if 0 < rows < count:
            return rows
    return 0


@lru_cache(maxsize=1024)
def _drop_captures(p: Boolean) -> Boolean:
    """``p`` where whatever captures decide is true: blocks are known before a run."""
    if isinstance(p, (sympy.And, sympy.Or)):
        return p.func(*map(_drop_captures, p.args))
    return TRUE if has_captures(p) else p


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


def _find_needs(pieces: Sequence[Piece], length: int | None) -> list[Rows]:
    """Runs of the KV rows that pieces read; all as one where the length is open."""
    rows = [p.kv for p in pieces]
    if length is None:
        return [_hull(rows)]
    runs: list[Rows] = []
    for run in sorted(rows, key=lambda r: _at_two(r.start)):
        if runs and _at_two(run.start) <= _at_two(runs[-1].stop):
            runs[-1] = _hull([runs[-1], run])
        else:
            runs.append(run)
    return runs


def _in_chunks(rows: Rows, chunk: int | None) -> Rows:
    """Write numbers of rows as chunks and the rest, so that texts read alike."""
    if chunk is None:
        return rows
    return Rows(divmod(rows.start[1], chunk), divmod(rows.stop[1], chunk))
