"""Whether a schedule computes each kept pair of a mask exactly once.

Small sequences are checked pair by pair, longer ones box by box with coverage. What
captures decide counts as kept nowhere when it must be, everywhere when it may be.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile.errors import PlanError
from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import Layout, Side
from ringcompile.ir.mask import FALSE, TRUE, B, H, has_captures
from ringcompile.ir.schedule import Coverage, Kernel, Part, Schedule, Tile
from ringcompile.plan.coverage import Span, find_coverage
from ringcompile.plan.tiles import EMPTY_TILE, Strip, find_strips

MAX_PAIRWISE_LENGTH = 320
_SAMPLE_CHUNKS = (2, 3, 5)
_SAMPLE_HEADS = 16


Sides = tuple[Side, Side]
"""Where queries and where keys lie, both of known length."""


def checked_sides(schedule: Schedule) -> tuple[Sides, ...]:
    """What a schedule is checked for: its own lengths, or some that it serves."""
    q, kv = schedule.q_side, schedule.kv_side
    if schedule.keys is None:
        return tuple((q.at(s), q.at(s)) for s in _checked_lengths(q))
    of_q, of_kv = _checked_lengths(q), _checked_lengths(kv)[::-1]
    count = max(len(of_q), len(of_kv))  # the least of one with the most of the other
    pairs = zip(of_q * count, of_kv * count, strict=False)
    return tuple((q.at(s), kv.at(t)) for s, t in dict.fromkeys(pairs))


def _checked_lengths(side: Side) -> tuple[int, ...]:
    if side.length is not None:
        return (side.length,)
    lengths = (chunk * side.layout.num_chunks for chunk in _SAMPLE_CHUNKS)
    return tuple(s for n, s in enumerate(lengths) if not n or s <= MAX_PAIRWISE_LENGTH)


def check_pairs(schedule: Schedule, number: int) -> None:
    """Raise unless part ``number`` computes each kept pair once and no other.

    Raises:
        PlanError: a pair is left out, computed twice, or computed though masked.
    """
    part, layout = schedule.parts[number], schedule.layout
    for sides in checked_sides(schedule):
        lengths = [_length(side) for side in sides]
        if part.selection is not None:
            _check_selected(part, layout, lengths[0], number)
        elif max(lengths) <= MAX_PAIRWISE_LENGTH:
            _check_pairwise(part, sides, number)
        else:
            _check_boxes(part, sides, number)


def _length(side: Side) -> int:
    assert side.length is not None, "checked for a known length"
    return side.length


def _format_lengths(sides: Sides) -> str:
    q, kv = sides
    return f"S={q.length}" if q.length == kv.length else f"S={q.length} and {kv.length}"


def _fail(what: str, number: int) -> PlanError:
    because = "each pair that the mask keeps is computed exactly once, and no other"
    return PlanError(what, at=f"part {number}", because=because)


def _tiles(part: Part, cp_size: int) -> Iterator[tuple[int, int, Tile]]:
    """``(q_rank, kv_rank, tile)`` of all rank pairs, dropped steps as empty tiles."""
    steps = {step.shift: step for step in part.steps}
    for shift in range(cp_size):
        for rank in range(cp_size):
            tile = steps[shift].tiles[rank] if shift in steps else EMPTY_TILE
            yield rank, (rank - shift) % cp_size, tile


# Pair by pair.


def _check_pairwise(part: Part, sides: Sides, number: int) -> None:
    shape = _length(sides[0]), _length(sides[1])
    must, may = find_kept(part.mask.keeps, *shape)
    times = torch.zeros(shape, dtype=torch.int8)
    unmasked = torch.zeros(shape, dtype=torch.bool)
    cp_size = sides[0].layout.cp_size
    q_chunk, kv_chunk = (
        side.layout.chunk_size(size) for side, size in zip(sides, shape, strict=True)
    )
    q_places, kv_places = (
        [side.layout.position_tensor(r, chunk, length=size) for r in range(cp_size)]
        for side, chunk, size in zip(sides, (q_chunk, kv_chunk), shape, strict=True)
    )
    for q_rank, kv_rank, tile in _tiles(part, cp_size):
        for piece in tile.pieces:
            q = q_places[q_rank][slice(*piece.q.resolve(q_chunk))]
            k = kv_places[kv_rank][slice(*piece.kv.resolve(kv_chunk))]
            if int(q.max()) >= shape[0] or int(k.max()) >= shape[1]:
                raise _fail(f"rank {q_rank} computes padding", number)
            taken = torch.ones(len(q), len(k), dtype=torch.bool)
            if piece.kernel is Kernel.CAUSAL:
                taken = torch.arange(len(q))[:, None] >= torch.arange(len(k))
            times[q[:, None], k] += taken
            if piece.kernel is not Kernel.MASKED:
                unmasked[q[:, None], k] |= taken
    for wrong, what in (
        (times > 1, "computed more than once"),
        ((times == 0) & may, "left out"),
        (unmasked & ~must, "computed though masked"),
    ):
        if bool(wrong.any()):
            q_at, k_at = wrong.nonzero()[0].tolist()
            at = _format_lengths(sides)
            raise _fail(f"query {q_at} and key {k_at} {what} at {at}", number)


@lru_cache(maxsize=32)
def find_kept(
    p: Boolean, length: int, kv_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Which pairs every capture, and which any capture, lets count.

    Of queries by keys, which are as many unless ``kv_length`` says otherwise.

    Only the first heads are looked at, so the first may hold too many pairs and the
    second too few; a right schedule is never refused for it.
    """
    q, k = torch.arange(length), torch.arange(kv_length or length)
    heads = _SAMPLE_HEADS if H in p.free_symbols else 1
    head = torch.arange(heads)[:, None, None]
    place = (q.new_zeros(()), head, q[:, None], k[None])
    must, may = (
        evaluate(replace_unknown(p, value), place).expand(heads, len(q), len(k))
        for value in (FALSE, TRUE)
    )
    return must.all(0), may.any(0)


def replace_unknown(p: Boolean, value: Boolean) -> Boolean:
    """``p`` with every atom that captures or the batch decide set to ``value``."""
    if isinstance(p, (sympy.And, sympy.Or)):
        return p.func(*(replace_unknown(a, value) for a in p.args))
    return value if has_captures(p) or B in p.free_symbols else p


# Selected rows: the tile says whether there is a pair, the rows follow from it.


def _check_selected(part: Part, layout: Layout, length: int, number: int) -> None:
    selection = part.selection
    assert selection is not None, "only parts with a selection come here"
    if length > MAX_PAIRWISE_LENGTH:
        return
    _, may = find_kept(part.mask.keeps, length)
    at = torch.arange(length)
    segment, residue = selection.segments_of(at), selection.residues_of(at)
    residue = torch.where(selection.covers(at), residue, -1)
    offsets = {s for s in selection.offsets if s is not None}
    selected = torch.stack([residue == s for s in sorted(offsets)])
    may = may & (selected[:, :, None] & selected[:, None]).any(0)
    may &= segment[:, None] == segment
    for q_rank, kv_rank, tile in _tiles(part, layout.cp_size):
        if tile.coverage is not Coverage.EMPTY:
            continue
        q, k = (
            torch.tensor([p for p in layout.positions(r, length) if p < length]).long()
            for r in (q_rank, kv_rank)
        )
        if bool(may[q[:, None], k].any()):
            what = f"rank {q_rank} leaves out selected keys of rank {kv_rank}"
            raise _fail(f"{what} at S={length}", number)


# Box by box.


@dataclass(frozen=True, slots=True)
class _Ranges:
    """A shard's rows cut at every edge that a strip or a piece has."""

    strips: tuple[Strip, ...]
    edges: frozenset[int]

    def boxes(self) -> Iterator[tuple[int, Strip]]:
        """The first row and the positions of each range."""
        for strip in self.strips:
            first, count = strip.row[1], strip.count[1]
            inner = {e for e in self.edges if first < e < first + count}
            for start, stop in pairwise(sorted({first, *inner, first + count})):
                yield start, strip.part(start - first, stop - start)


def _check_boxes(part: Part, sides: Sides, number: int) -> None:
    q_chunk, kv_chunk = (side.layout.chunk_size(_length(side)) for side in sides)
    for q_rank, kv_rank, tile in _tiles(part, sides[0].layout.cp_size):
        pieces = [
            (p.q.resolve(q_chunk), p.kv.resolve(kv_chunk), p.kernel)
            for p in tile.pieces
        ]
        q_strips, kv_strips = (
            find_strips(side.layout, r, side.length)
            for side, r in zip(sides, (q_rank, kv_rank), strict=True)
        )
        ends = (_end(q_strips), _end(kv_strips))
        if any(q[1] > ends[0] or kv[1] > ends[1] for q, kv, _ in pieces):
            raise _fail(f"rank {q_rank} computes padding", number)
        q_ranges = _Ranges(q_strips, frozenset(e for q, _, _ in pieces for e in q))
        kv_ranges = _Ranges(kv_strips, frozenset(e for _, kv, _ in pieces for e in kv))
        for i, q_strip in q_ranges.boxes():
            for j, kv_strip in kv_ranges.boxes():
                within = [
                    (kernel, i - q[0], j - kv[0])
                    for q, kv, kernel in pieces
                    if q[0] <= i < q[1] and kv[0] <= j < kv[1]
                ]
                wrong = _find_fault(part.mask.keeps, q_strip, kv_strip, within)
                if wrong:
                    what = f"rank {q_rank} row {i} on, rank {kv_rank} row {j} on"
                    at = _format_lengths(sides)
                    raise _fail(f"{what}: pairs {wrong} at {at}", number)


def _end(strips: tuple[Strip, ...]) -> int:
    return max((s.row[1] + s.count[1] for s in strips), default=0)


def _find_fault(
    p: Boolean, q: Strip, kv: Strip, within: list[tuple[Kernel, int, int]]
) -> str:
    """What is wrong with a box that no edge cuts; nothing if empty."""
    if len(within) > 1:
        return "computed more than once"
    if not within:
        return "" if _is_empty(p, q, kv) else "left out"
    kernel, i, j = within[0]
    if kernel is Kernel.MASKED:
        return ""
    if kernel is Kernel.FULL:
        is_full = find_coverage(p, q.span, kv.span).coverage is Coverage.FULL
        return "" if is_full else "computed though masked"
    if q.order is None and _is_triangle(p, q.span, kv.span, i - j):
        return ""
    return "unlike a causal piece"


def _is_empty(p: Boolean, q: Strip, kv: Strip) -> bool:
    """Whether no pair counts; what is undecided is asked about down to single rows."""
    coverage = find_coverage(p, q.span, kv.span).coverage
    if coverage is Coverage.EMPTY:
        return True
    sizes = [s.count[1] for s in (q, kv)]
    half = max(sizes) // 2
    is_run = q.order is None and kv.order is None
    if not half or (is_run and coverage is Coverage.FULL):
        return False
    if sizes[0] > sizes[1]:
        parts = (q.part(0, half), q.part(half, sizes[0] - half))
        return all(_is_empty(p, part, kv) for part in parts)
    parts = (kv.part(0, half), kv.part(half, sizes[1] - half))
    return all(_is_empty(p, q, part) for part in parts)


def _is_triangle(p: Boolean, q: Span, kv: Span, lead: int, depth: int = 4) -> bool:
    """Whether row i sees exactly the rows ``j <= i + lead``, down to small boxes."""
    num_q, num_kv = q.count[1], kv.count[1]
    coverage = find_coverage(p, q, kv).coverage
    if num_kv - 1 <= lead:
        return coverage is Coverage.FULL
    if lead + num_q - 1 < 0:
        return coverage is Coverage.EMPTY
    if depth == 0 or num_q == num_kv == 1:
        return coverage is Coverage.PARTIAL
    top, left = max(num_q // 2, 1), max(num_kv // 2, 1)
    return all(
        _is_triangle(p, q.part(i, n), kv.part(j, m), lead + i - j, depth - 1)
        for i, n in ((0, top), (top, num_q - top))
        for j, m in ((0, left), (left, num_kv - left))
        if n and m
    )
