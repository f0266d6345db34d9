"""How many (query, key) pairs a piece computes: what the cost model counts.

Invariant: exact for full and causal pieces, estimated from a few rows for masked ones;
where captures or the head decide, every pair counts.
"""

from collections import deque
from functools import lru_cache

import sympy
from sympy.logic.boolalg import Boolean

from ringcompile.ir.layout import Side
from ringcompile.ir.mask import TRUE, B, H, has_captures
from ringcompile.ir.schedule import Coverage, Kernel, Part, Piece
from ringcompile.plan.coverage import Span, find_coverage
from ringcompile.plan.tiles import Strip, find_parts

_SAMPLED_ROWS = 8
_MAX_BOXES = 96
_GOLDEN = (5**0.5 - 1) / 2


def count_pairs(
    part: Part, piece: Piece, q_side: Side, kv_side: Side, *, ranks: tuple[int, int]
) -> float:
    """Pairs that a piece computes, averaged over heads.

    Args:
        part: the part that the piece belongs to.
        piece: the piece.
        q_side: where queries lie, of a known length.
        kv_side: where keys lie, of a known length.
        ranks: whose queries, whose keys and values.
    """
    assert q_side.chunk is not None, "queries of a known length"
    assert kv_side.chunk is not None, "keys of a known length"
    q_rows, kv_rows = piece.q.resolve(q_side.chunk), piece.kv.resolve(kv_side.chunk)
    num_q, num_kv = q_rows[1] - q_rows[0], kv_rows[1] - kv_rows[0]
    if piece.kernel is Kernel.FULL:
        return num_q * num_kv
    if piece.kernel is Kernel.CAUSAL:
        return num_q * (num_q + 1) / 2
    keeps = drop_unknown(part.mask.keeps)
    kept = sum(
        _estimate_kept(keeps, q.span, kv.span) * _density(q) * _density(kv)
        for q in find_parts(q_side, ranks[0], q_rows)
        for kv in find_parts(kv_side, ranks[1], kv_rows)
    )
    return kept if part.selection is None else kept / part.selection.rate**2


def _density(strip: Strip) -> float:
    """Rows for each position of its span: less than one where it is no run."""
    return strip.count[1] / strip.span.count[1]


@lru_cache(maxsize=1024)
def drop_unknown(p: Boolean) -> Boolean:
    """``p`` where whatever captures, batch and head decide is true."""
    if isinstance(p, (sympy.And, sympy.Or)):
        return p.func(*map(drop_unknown, p.args))
    return TRUE if has_captures(p) or p.free_symbols & {B, H} else p


@lru_cache(maxsize=65536)
def _estimate_kept(p: Boolean, q: Span, kv: Span) -> float:
    """Kept pairs of a box: some rows, one in each of equal ranges, stand for all."""
    num_rows = q.count[1]
    sampled = min(num_rows, _SAMPLED_ROWS)
    # Golden steps, so that no period of the mask meets the same place every time.
    rows = (n + (n * _GOLDEN % 1 if num_rows > sampled else 0) for n in range(sampled))
    part = num_rows / sampled
    return part * sum(_count_keys(p, q.part(int(row * part), 1), kv) for row in rows)


def _count_keys(p: Boolean, row: Span, kv: Span) -> float:
    """Keys that one query sees, by bisection; of boxes left undecided, half."""
    boxes = deque([kv])
    kept = 0.0
    for _ in range(_MAX_BOXES):
        if not boxes:
            return kept
        box = boxes.popleft()
        count = box.count[1]
        coverage = find_coverage(p, row, box).coverage
        if coverage is Coverage.FULL:
            kept += count
        elif coverage is Coverage.PARTIAL and count > 1:
            half = count // 2
            boxes += (box.part(0, half), box.part(half, count - half))
    return kept + sum(box.count[1] for box in boxes) / 2
