"""Pieces under a mask as kernel calls without one, as far as that is faster.

A window is dense calls, or a call whose classes of rows are told apart (``cut_bands``).
Where a mask keeps a window and other pairs, such as global and random blocks, the
window is cut off, then rectangles of blocks that all count; what is left has a mask of
its own. Invariant: a pair that counts is in exactly one call, and no other is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile.ir.layout import Side
from ringcompile.ir.mask import (
    K,
    Mask,
    Q,
    at_least_zero,
    conjunction,
    conjuncts,
    disjunction,
    has_captures,
    negate,
)
from ringcompile.ir.schedule import Kernel, Piece, Rows
from ringcompile.ir.text import format_mask
from ringcompile.lowering.calls import Call, rows
from ringcompile.lowering.cut_bands import cut_window
from ringcompile.lowering.tiles.block_lists import BLOCK, EMPTY, FULL, mark_blocks

_WIDER = 2  # a window beside other pairs, as its results are merged with theirs
_LEAST_SIDE = 8  # blocks of a rectangle's long side
_MOST_RECTANGLES = 8
_MOST_RUNS = 2  # of positions that a rectangle's rows are
_Run = tuple[int, int]  # its start and its end


@lru_cache(maxsize=4096)
def cut_masked(
    piece: Piece,
    mask: Mask,
    num_heads: int,
    sides: tuple[Side, Side],
    ranks: tuple[int, int],
    least_width: int,
) -> tuple[Piece, ...]:
    """A piece under a mask as other calls, if some need none.

    Args:
        piece: of a tile, its rows those of shards.
        mask: the pairs that count.
        num_heads: query heads.
        sides: where queries and keys lie, of known lengths.
        ranks: whose queries, whose keys.
        least_width: rows of a window below which one kernel with a mask is faster.

    Returns:
        The calls, or the piece as it is.
    """
    where = (sides, ranks)
    window = cut_window(piece, mask.keeps, *where, least_width=least_width)
    if window is not None:
        return window
    ways = list(_find_ways(mask.keeps))
    if not ways:
        return (piece,)
    calls: tuple[Piece, ...] = ()
    for way in ways:
        width = _WIDER * least_width
        window = cut_window(piece, way, *where, least_width=width, may_be_narrow=False)
        calls = window or ()
        if calls:
            mask = replace(mask, keeps=conjunction(mask.keeps, negate(way)))
            break
    rest = _cut_rectangles(piece, mask, num_heads, *where)
    is_cut = bool(calls) or len(rest) > 1
    return (*calls, *rest) if is_cut else (piece,)


def _find_ways(keeps: Boolean) -> Iterator[Boolean]:
    """The ways in which a pair may count, of a mask that names several."""
    atoms = conjuncts(keeps)
    for either in atoms:
        if isinstance(either, sympy.Or):
            others = [atom for atom in atoms if atom is not either]
            yield from (conjunction(way, *others) for way in either.args)


def _cut_rectangles(
    piece: Piece,
    mask: Mask,
    num_heads: int,
    sides: tuple[Side, Side],
    ranks: tuple[int, int],
) -> tuple[Piece, ...]:
    """Rectangles of pairs that all count, and what is left under a mask, if any is."""
    if has_captures(mask.keeps):
        return (Call(piece.q, piece.kv, Kernel.MASKED, mask=format_mask(mask)),)
    q, kv = (
        _Axis.of(*place)
        for place in zip((Q, K), sides, ranks, (piece.q, piece.kv), strict=True)
    )
    marks = mark_blocks(mask.keeps, num_heads, q.positions, kv.positions).clone()
    calls = list[Piece]()
    for of_q, of_kv in _find_rectangles((marks == FULL).all(0)):
        box = q.holds(of_q), kv.holds(of_kv)
        if None in box or len(calls) == _MOST_RECTANGLES:
            continue
        marks[:, slice(*of_q), slice(*of_kv)] = EMPTY
        mask &= negate(conjunction(*box))
        calls.append(Call(q.rows(of_q), kv.rows(of_kv), Kernel.FULL))
    some = (marks != EMPTY).any(0)
    if some.any():
        left = q.rows(_hull(some.any(1))), kv.rows(_hull(some.any(0)))
        calls.append(Call(*left, Kernel.MASKED, mask=format_mask(mask)))
    return tuple(calls)


@dataclass(frozen=True, slots=True)
class _Axis:
    """A piece's queries or its keys, in blocks.

    Attributes:
        symbol: their position in masks.
        first: the first row of the shard.
        positions: where they are.
    """

    symbol: sympy.Symbol
    first: int
    positions: tuple[int, ...]

    @classmethod
    def of(cls, symbol: sympy.Symbol, side: Side, rank: int, of: Rows) -> "_Axis":
        """Rows of a shard of known length."""
        assert side.length is not None, "pieces of known lengths are cut"
        first, stop = of.resolve(side.layout.chunk_size(side.length))
        at = side.layout.positions(rank, side.length)
        return cls(symbol, first, tuple(at[first:stop]))

    def _ends(self, blocks: _Run) -> _Run:
        start, stop = blocks
        return start * BLOCK, min(stop * BLOCK, len(self.positions))

    def rows(self, blocks: _Run) -> Rows:
        """Of the shard."""
        start, stop = self._ends(blocks)
        return rows(self.first + start, self.first + stop)

    def holds(self, blocks: _Run) -> Boolean | None:
        """That the position is one of those; None: they are many runs."""
        start, stop = self._ends(blocks)
        at = torch.tensor(self.positions[start:stop])
        edges = ((at.diff() != 1).nonzero()[:, 0] + 1).tolist()
        if len(edges) >= _MOST_RUNS:
            return None
        runs = [at[a:b].tolist() for a, b in pairwise([0, *edges, len(at)])]
        x = self.symbol
        return disjunction(
            *(
                conjunction(at_least_zero(x - run[0]), at_least_zero(run[-1] - x))
                for run in runs
            )
        )


def _find_rectangles(are_full: Tensor) -> Iterator[tuple[_Run, _Run]]:
    """Columns of blocks that are full over half of the rows, then such rows.

    A kernel with a mask goes through each alone, one block after the other.
    """
    left = are_full.clone()
    for is_column in (True, False):
        lines = left.T if is_column else left
        found = [_longest_run(line) for line in lines]
        least = max(_LEAST_SIDE, lines.shape[1] // 2)
        edges = [n for n in range(1, len(found)) if found[n] != found[n - 1]]
        for start, stop in pairwise([0, *edges, len(found)]):
            long = found[start]
            if long[1] - long[0] >= least:
                lines[start:stop, slice(*long)] = False
                short = (start, stop)
                yield (long, short) if is_column else (short, long)


def _hull(line: Tensor) -> _Run:
    """From the first to the last of what is true."""
    at = line.nonzero()[:, 0]
    return int(at[0]), int(at[-1]) + 1


def _longest_run(line: Tensor) -> _Run:
    """The longest run of what is true; none of nothing."""
    edges = torch.cat([line.new_zeros(1), line, line.new_zeros(1)]).int().diff()
    starts, stops = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    if not len(starts):
        return (0, 0)
    n = int((stops - starts).argmax())
    return int(starts[n]), int(stops[n])
