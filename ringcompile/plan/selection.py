"""Selected rows: what of a shard takes part in dilated attention.

Rows are selected per query head; a KV head's rows are the union over its query heads.
Invariant: a padded row is never selected.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask
from ringcompile.ir.schedule import Coverage, Kernel, Piece, Rows, Selection, Tile
from ringcompile.plan.coverage import DependsOnLength, Span, find_coverage
from ringcompile.plan.tiles import EMPTY_TILE


def selected_rows(
    selection: Selection,
    positions: Sequence[int],
    *,
    length: int,
    for_positions: Sequence[int] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Which rows of a shard take part.

    Args:
        selection: the selection.
        positions: global positions of the shard's rows; those >= ``length`` are pads.
        length: tokens S.
        for_positions: positions of the shard whose queries read these rows.

    Returns:
        Without ``for_positions`` the query rows of each query head; with it the KV rows
        of each KV head that lie in a segment those queries share: those that travel.
    """
    at = torch.tensor(positions)
    taking_part = (at < length) & selection.covers(at)
    heads: Sequence[frozenset[int]] = [
        frozenset(() if s is None else (s,)) for s in selection.offsets
    ]
    if for_positions is not None:
        heads = selection.groups
        readers = torch.tensor(for_positions)
        readers = readers[(readers < length) & selection.covers(readers)]
        segments = selection.segments_of(readers)
        taking_part &= torch.isin(selection.segments_of(at), segments)
    residues = selection.residues_of(at)
    return tuple(
        tuple(torch.nonzero(taking_part & _is_any_of(residues, head))[:, 0].tolist())
        for head in heads
    )


def _is_any_of(values: Tensor, numbers: frozenset[int]) -> Tensor:
    return torch.isin(values, torch.tensor(sorted(numbers), dtype=values.dtype))


def build_selected_tile(
    mask: Mask,
    selection: Selection,
    layout: Layout,
    ranks: tuple[int, int],
    length: int | None,
) -> Tile:
    """Decide the tile of one query shard and one KV shard, their selected rows only.

    Args:
        mask: the pairs that count among the selected rows.
        selection: the rows that take part.
        layout: which positions each rank holds.
        ranks: whose queries, whose keys and values.
        length: tokens S.

    Returns:
        One MASKED piece over all rows of both shards if any pair counts: which of them
        are computed and travel is `selected_rows`. Its coverage is never FULL.

    Raises:
        DependsOnLength: ``length`` is None.
    """
    if length is None:
        msg = f"rows selected by segment {selection.segment}, rate {selection.rate}"
        raise DependsOnLength(msg)
    offsets = sorted({s for s in selection.offsets if s is not None})
    if not any(
        _has_pair(mask, selection, layout, (*ranks, s, length)) for s in offsets
    ):
        return EMPTY_TILE
    rows = Rows((0, 0), (layout.chunks_per_rank, 0))
    return Tile(Coverage.PARTIAL, (Piece(rows, rows, Kernel.MASKED),), (rows,))


def _has_pair(
    mask: Mask, selection: Selection, layout: Layout, where: tuple[int, int, int, int]
) -> bool:
    """Whether a query and a key with this offset share a segment and may count."""
    q_rank, kv_rank, offset, length = where
    q = _find_segments(selection, layout, q_rank, offset, length=length)
    kv = _find_segments(selection, layout, kv_rank, offset, length=length)
    return any(
        find_coverage(mask.keeps, q[n], kv[n]).coverage is not Coverage.EMPTY
        for n in sorted(q.keys() & kv.keys())
    )


@lru_cache(maxsize=1024)
def _find_segments(
    selection: Selection, layout: Layout, rank: int, offset: int, *, length: int
) -> dict[int, Span]:
    """The hull of a shard's selected positions in each segment that has some."""
    chunk = layout.chunk_size(length)
    at = layout.position_tensor(rank, chunk, length=length).sort().values
    takes_part = (at < length) & selection.covers(at)
    at = at[takes_part & (selection.residues_of(at) == offset)]
    segments, counts = torch.unique_consecutive(
        selection.segments_of(at), return_counts=True
    )
    last = counts.cumsum(0) - 1
    first = last - counts + 1
    return {
        n: Span((0, start), 1, (0, stop - start + 1))
        for n, start, stop in zip(
            segments.tolist(), at[first].tolist(), at[last].tolist(), strict=True
        )
    }
