"""Windows as dense kernel calls: a band of pairs is a row of triangles.

Rows in runs of the window's length see, of one run of keys, those up to the diagonal
and, of the run before, those from the diagonal on: kernels without a mask, all runs in
one batch. Of a dilated window that is so for each class of rows; if it is narrow, one
kernel with a mask computes all classes as a batch. Where a window counts in blocks its
edge is a stair: a diagonal, and a small triangle for each block of rows.
Invariant: a pair that counts is in exactly one call, and no other is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations, product
from math import gcd

import sympy
from sympy.logic.boolalg import Boolean

from ringcompile.ir.layout import Side
from ringcompile.ir.mask import K, Mask, Q, at_least_zero, conjunction
from ringcompile.ir.schedule import Coverage, Kernel, Piece
from ringcompile.ir.sums import split_floor, split_terms
from ringcompile.ir.text import format_mask
from ringcompile.lowering.calls import Call, join_calls, rows
from ringcompile.plan.coverage import Span, find_coverage
from ringcompile.plan.tiles import Strip, find_parts

_MOST_CALLS = 16
_MOST_CLASSES = 32
_FAR = 2**40
ANY_WIDTH = 2**42  # more than a band that has one edge
LEAST_WINDOW = {False: 16, True: 896}
"""Rows of a window below which one kernel with a mask is faster, by whether Inductor
generates one. H200, forward and backward of 32:8 heads at 32k rows, ms with a mask and
as triangles: window 512 5.3, 5.9; 1024 7.6, 7.5; 2048 of each of 4 classes 12.2, 11.4.
"""


@dataclass(frozen=True, slots=True)
class Band:
    """Row i sees the rows j of ``least <= i - j <= most``.

    Where an edge is a stair, it sees more of the block of rows that the edge runs
    through: all that lie nearer than the band at ``least``, farther at ``most``.

    Attributes:
        least: the least distance; of a stair that of blocks, in rows.
        most: the greatest; of a stair one less than that of blocks, in rows.
        least_step: rows of a block of the stair at ``least``; 1: there is none.
        most_step: the same at ``most``.
    """

    least: int
    most: int
    least_step: int = 1
    most_step: int = 1

    @property
    def width(self) -> int:
        """How many rows a row sees, far from all edges."""
        return self.most - self.least + 1


@lru_cache(maxsize=4096)
def cut_window(
    piece: Piece,
    keeps: Boolean,
    sides: tuple[Side, Side],
    ranks: tuple[int, int],
    *,
    least_width: int,
    may_be_narrow: bool = True,
) -> tuple[Call, ...] | None:
    """A piece under a mask as calls without one, if the mask keeps a wide band.

    If it is narrow and each of n classes of rows has it, one call under a mask has the
    classes as batches.

    Args:
        piece: of a tile, its rows those of shards.
        keeps: the mask.
        sides: where queries and keys lie, of known lengths.
        ranks: whose queries, whose keys.
        least_width: rows of a band below which it is narrow.
        may_be_narrow: whether such a call under a mask will do.

    Returns:
        The calls; None: it is no such band.
    """
    q_strips, kv_strips = (
        find_parts(side, rank, of.resolve(side.chunk or 0))
        for side, rank, of in zip(sides, ranks, (piece.q, piece.kv), strict=True)
    )
    calls: list[Call] = []
    for q, kv in product(q_strips, kv_strips):
        found = _find_classes(keeps, q, kv)
        if found is None:
            return None
        band, n = found
        if 0 < band.width < least_width:
            if n == 1 or not may_be_narrow:
                return None
            calls.append(_mask_classes(band, n, q, kv))
            continue
        calls += (
            _move(call, q.row[1], kv.row[1], n)
            for call in cut_band(band, q.count[1] // n, kv.count[1] // n)
        )
    return tuple(calls) if len(calls) <= _MOST_CALLS else None


def _find_band(keeps: Boolean, q: Strip, kv: Strip) -> Band | None:
    """What a mask keeps of two runs; None: not a band."""
    decision = find_coverage(keeps, q.span, kv.span)
    if decision.coverage is Coverage.EMPTY:
        return Band(0, -1)
    is_run = q.order is None and kv.order is None and q.span.stride == kv.span.stride
    if decision.undecided and not is_run:
        return None
    edges: dict[int, list[_Edge]] = {1: [], -1: []}  # of i - j from below, of j - i
    for atom in decision.undecided:
        found = _read_edge(atom, q, kv)
        if found is None:
            return None
        sign, edge = found
        edges[sign].append(edge)
    lower, upper = (_join_edges(edges[sign]) for sign in (1, -1))
    if lower is None or upper is None:
        return None
    has_stairs = max(lower.step, upper.step) > 1
    # The far stair has its diagonal, so that widths of whole blocks stay such.
    most = -upper.least - (upper.step > 1)
    band = Band(lower.least, most, lower.step, upper.step)
    # Stairs reach further than their diagonals: such may leave pairs between them.
    return None if has_stairs and band.width <= 0 else band


def _read_edge(atom: Boolean, q: Strip, kv: Strip) -> "tuple[int, _Edge] | None":
    """An edge of ``i - j`` (sign 1) or of ``j - i`` (-1); None: it is no edge."""
    if not isinstance(atom, sympy.Ge):
        return None
    terms, constant = split_terms(atom.lhs)
    step, stride = _find_step(terms), q.span.stride
    if step is None:
        return None
    starts = q.span.start[1], kv.span.start[1]
    sizes = (*starts, q.count[1], kv.count[1])
    if step > 1 and (stride > 1 or any(n % step for n in sizes)):
        return None
    sign = 1 if any(Q in t.free_symbols and n > 0 for t, n in terms.items()) else -1
    # Of rows i and j, for q - k + constant >= 0 and its mirror image.
    apart = sign * (starts[0] - starts[1])
    return sign, _Edge(-((step * constant + apart) // stride), step)


@dataclass(frozen=True, slots=True)
class _Edge:
    """``x >= least`` of a distance x between rows, or between their blocks of ``step``.

    Of blocks ``least`` counts rows: those of as many blocks.
    """

    least: int
    step: int

    def implies(self, other: "_Edge") -> bool:
        """Whether what is behind this edge is behind the other one."""
        if self.step == other.step:
            return self.least >= other.least
        # Rows of blocks x apart are up to a block closer, or further, than x.
        if other.step == 1:
            return self.least - self.step + 1 >= other.least
        if self.step == 1:
            return self.least >= other.least
        return False


def _find_step(terms: Mapping[sympy.Basic, int]) -> int | None:
    """1 of ``q - k`` or ``k - q``, n of that of their blocks of n; None of others."""
    if terms in ({Q: 1, K: -1}, {Q: -1, K: 1}):
        return 1
    floors = [split_floor(t) for t in terms if isinstance(t, sympy.floor)]
    if len(floors) != len(terms) or {x for x, _ in floors} != {Q, K}:
        return None
    steps = {n for _, n in floors}
    is_one = len(steps) == 1 and set(terms.values()) == {1, -1}
    return steps.pop() if is_one else None


def _join_edges(edges: Sequence[_Edge]) -> _Edge | None:
    """The one that implies all others; None: there is none."""
    if not edges:
        return _Edge(-_FAR, 1)
    return next((e for e in edges if all(map(e.implies, edges))), None)


def _find_classes(keeps: Boolean, q: Strip, kv: Strip) -> tuple[Band, int] | None:
    """A band that each of so many classes of rows has, one class with one other."""
    band = _find_band(keeps, q, kv)
    if band is not None:
        return band, 1
    # Rows that lie apart are of fewer classes: of two residues, if of every other one.
    moduli = {int(m.args[1]) for m in keeps.atoms(sympy.Mod)}
    for n in sorted({m // gcd(m, q.span.stride) for m in moduli}):
        if n > _MOST_CLASSES or q.count[1] % n or kv.count[1] % n:
            continue
        q_classes, kv_classes = ([_class(s, i, n) for i in range(n)] for s in (q, kv))
        bands = {
            _find_band(keeps, *of) for of in zip(q_classes, kv_classes, strict=True)
        }
        are_apart = all(
            find_coverage(keeps, q_classes[i].span, kv_classes[j].span).coverage
            is Coverage.EMPTY
            for i, j in permutations(range(n), 2)
        )
        if len(bands) == 1 and are_apart:
            (band,) = bands
            return None if band is None else (band, n)
    return None


def _class(strip: Strip, i: int, n: int) -> Strip:
    """Rows i, i + n and so on."""
    if strip.order is not None:
        return Strip.of_order(strip.row, strip.order[i::n])
    (_, start), stride = strip.span.start, strip.span.stride
    count = (0, strip.count[1] // n)
    return Strip(strip.row, Span((0, start + i * stride), n * stride, count))


def _move(call: Call, q: int, kv: int, classes: int) -> Call:
    (_, a), (_, b) = call.q.start, call.q.stop
    (_, c), (_, d) = call.kv.start, call.kv.stop
    return replace(
        call,
        q=rows(q + classes * a, q + classes * b),
        kv=rows(kv + classes * c, kv + classes * d),
        classes=classes,
    )


def _mask_classes(band: Band, classes: int, q: Strip, kv: Strip) -> Call:
    """One call under a mask that reads positions of the first class of rows.

    The others lie as far apart, and see the same rows of theirs.
    """
    step = classes * q.span.stride
    apart = Q - K - (q.span.start[1] - kv.span.start[1])
    edges = []
    if band.least > -_FAR:
        edges.append(at_least_zero(apart - step * band.least))
    if band.most < _FAR:
        edges.append(at_least_zero(step * band.most - apart))
    keeps = conjunction(*edges)
    mask = format_mask(Mask(keeps))
    return Call(q.rows, kv.rows, Kernel.MASKED, classes=classes, mask=mask)


def cut_band(band: Band, num_q: int, num_kv: int) -> list[Call]:
    """The calls of a band over so many queries and keys."""
    width = band.width
    if width <= 0:
        return []
    lower: list[Call] = []
    upper: list[Call] = []
    # Runs one row shorter than the window would do as well: the even one of both fits
    # blocks of kernels, where one does.
    run = max(1, width - width % 2)
    for top in range(max(band.least, 0), min(num_q, band.most + num_kv), run):
        # Of keys from ``top - most`` on the rows see those from the diagonal on, of
        # keys from ``top - least`` on those up to it.
        size = (num_q - top, num_kv)
        lower += _cut_triangle(run, top, top - band.least, *size, is_upper=False)
        upper += _cut_triangle(width - 1, top, top - band.most, *size, is_upper=True)
    stairs = (_cut_stair(band, num_q, num_kv, is_upper=side) for side in (False, True))
    return [call for calls in (lower, upper, *stairs) for call in join_calls(calls)]


def _cut_stair(band: Band, num_q: int, num_kv: int, *, is_upper: bool) -> list[Call]:
    """What an edge that is a stair has beside the band: a triangle on each step."""
    step, edge, without = band.most_step, band.most + 1, 0
    if is_upper:
        step, edge, without = band.least_step, band.least, 1  # the diagonal
    size = step - without
    return [
        Call(
            rows(top, top + size),
            rows(top - edge + without, top - edge + step),
            Kernel.CAUSAL if size > 1 else Kernel.FULL,
            is_upper=is_upper and size > 1,
        )
        for top in (range(0, num_q, step) if step > 1 else ())
        if 0 <= top - edge <= num_kv - step
    ]


def _cut_triangle(
    side: int, top: int, left: int, num_q: int, num_kv: int, *, is_upper: bool
) -> Iterator[Call]:
    """A triangle, both of its legs included, as far as rows and keys exist.

    Args:
        side: rows and columns of its square.
        top: its first row.
        left: its first column, maybe before all keys.
        num_q: how many rows there are from ``top`` on.
        num_kv: how many keys there are.
        is_upper: whether row i has the columns ``j >= i``, not ``j <= i``.
    """
    bottom, first, stop = min(side, num_q), max(0, -left), min(side, num_kv - left)
    if bottom <= 0 or first >= stop:
        return
    middle = max(first, min(bottom, stop))  # where the diagonal leaves it
    boxes = [(0, min(first, bottom), first, stop), (first, middle, middle, stop)]
    if not is_upper:
        boxes = [(middle, bottom, first, middle)]
    for a, b, c, d in ((first, middle, first, middle), *boxes):
        if a < b and c < d:
            is_triangle = (a, b) == (c, d) and b - a > 1
            yield Call(
                rows(top + a, top + b),
                rows(left + c, left + d),
                Kernel.CAUSAL if is_triangle else Kernel.FULL,
                is_upper=is_triangle and is_upper,
            )
