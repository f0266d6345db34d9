"""Which pairs count, exactly and box by box, so that no S x S tensor is made.

``plan.pairs`` estimates the same in less time. Invariant: no captures; a predicate is
asked for one head at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import H, Mask, canonicalize
from ringcompile.ir.schedule import Coverage, Selection
from ringcompile.plan.coverage import Span, find_coverage

_BOX_PAIRS = 1 << 18
"""Pairs evaluated at once: 2 MiB for each intermediate value."""

Box = tuple[range, range]
"""Query positions and key positions."""


def count_kept(keeps: Boolean, length: int, *, head: int = 0) -> int:
    """Count the pairs that a predicate keeps, by halving boxes that it does not decide.

    A window or a block layout takes time in proportion to the length of its edges, a
    predicate that no box decides (every so-many-th key) to ``length ** 2``.

    Args:
        keeps: the predicate, without captures.
        length: tokens S.
        head: the query head.
    """
    keeps = canonicalize(keeps.xreplace({H: sympy.Integer(head)}))
    total, boxes = 0, [(range(length), range(length))]
    while boxes:
        box = boxes.pop()
        coverage = find_coverage(keeps, *map(_span, box)).coverage
        num_pairs = len(box[0]) * len(box[1])
        if coverage is Coverage.FULL:
            total += num_pairs
        elif coverage is Coverage.PARTIAL and num_pairs > _BOX_PAIRS:
            boxes += _halve(box)
        elif coverage is Coverage.PARTIAL:
            total += int(_evaluate(keeps, box, head).sum())
    return total


def _span(positions: range) -> Span:
    return Span((0, positions.start), 1, (0, len(positions)))


def _halve(box: Box) -> list[Box]:
    q, k = box
    if len(q) >= len(k):
        return [(q[: len(q) // 2], k), (q[len(q) // 2 :], k)]
    return [(q, k[: len(k) // 2]), (q, k[len(k) // 2 :])]


def _evaluate(keeps: Boolean, box: Box, head: int) -> Tensor:
    q, k = (torch.arange(r.start, r.stop) for r in box)
    at = (torch.tensor(0), torch.tensor(head), q[:, None], k[None])
    return evaluate(keeps, at).expand(len(q), len(k))


def count_box(
    parts: Sequence[tuple[Mask, Selection | None]], box: Box, *, head: int = 0
) -> Tensor:
    """Count how many parts keep each pair of a box.

    Args:
        parts: masks without captures, and the rows that take part.
        box: query positions and key positions, both without gaps.
        head: the query head.

    Returns:
        int64 tensor of the box's shape.
    """
    counts = torch.zeros(len(box[0]), len(box[1]), dtype=torch.int64)
    for mask, selection in parts:
        kept = _evaluate(mask.keeps, box, head)
        if selection is not None:
            q, k = (_takes_part(selection, r, head) for r in box)
            kept = kept & q[:, None] & k[None]
        counts += kept
    return counts


def _takes_part(selection: Selection, positions: range, head: int) -> Tensor:
    at, offset = torch.arange(positions.start, positions.stop), selection.offsets[head]
    if offset is None:
        return torch.zeros(len(at), dtype=torch.bool)
    return selection.covers(at) & (selection.residues_of(at) == offset)


@dataclass(frozen=True, slots=True)
class Grid:
    """How often pairs count, in square cells of a head's pairs.

    Attributes:
        size: tokens along the edge of a cell; those at the end may be smaller.
        least: the least count in each cell, int64 ``(rows, columns)``.
        most: the greatest.
        mean: the mean, float64.
    """

    size: int
    least: Tensor
    most: Tensor
    mean: Tensor


def read_grid(
    parts: Sequence[tuple[Mask, Selection | None]],
    length: int,
    *,
    cells: int,
    head: int = 0,
) -> Grid:
    """Count all pairs in cells, a few rows of tokens at a time.

    Args:
        parts: masks without captures, and the rows that take part.
        length: tokens S.
        cells: at most so many rows and columns of cells.
        head: the query head.
    """
    size = -(-length // cells)
    rows = []
    for start in range(0, length, size):
        q = range(start, min(start + size, length))
        rows.append(_read_row(parts, q, length, size=size, head=head))
    return Grid(size, *(torch.stack(values) for values in zip(*rows, strict=True)))


def _read_row(
    parts: Sequence[tuple[Mask, Selection | None]],
    q: range,
    length: int,
    *,
    size: int,
    head: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Least, most and mean of the cells in one row of them."""
    step = max(1, _BOX_PAIRS // length)
    least, most, total = [], [], []
    for start in range(0, len(q), step):
        strip = count_box(parts, (q[start : start + step], range(length)), head=head)
        columns = strip.split(size, dim=1)
        least.append(torch.stack([c.amin() for c in columns]))
        most.append(torch.stack([c.amax() for c in columns]))
        total.append(torch.stack([c.double().mean(1).sum() for c in columns]))
    return (
        torch.stack(least).amin(0),
        torch.stack(most).amax(0),
        torch.stack(total).sum(0) / len(q),
    )
