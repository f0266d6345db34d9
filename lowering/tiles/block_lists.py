"""Lists of blocks of a mask that reads no captures: known before the graph runs.

Invariant: lists are made by an op when the graph runs, from a few numbers and the mask
as text, so that none is baked into the graph.
"""

from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch
import torch.nn.functional as F
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.evaluate import evaluate, table_values
from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import FALSE, TRUE, B, H, Mask
from ringcompile.ir.schedule import Coverage
from ringcompile.ir.text import format_mask, parse_mask
from ringcompile.lowering.tiles.block_tables import (
    Pairs,
    find_blocks,
    find_tables,
    list_blocks,
    spell_tables,
)
from ringcompile.lowering.uploads import prepare_upload, upload
from ringcompile.plan.check_pairs import replace_unknown
from ringcompile.plan.coverage import Span, find_coverage
from ringcompile.torch_private import FLEX_BLOCK, outside_tracing

BLOCK = FLEX_BLOCK
_BLOCKS_AT_ONCE, _MOST_LOOKED_AT = 64, 4096
EMPTY, SOME, FULL = 0, 1, 2


@dataclass(frozen=True, slots=True)
class SomeRows:
    """Rows of a rank's shard.

    Attributes:
        layout: which positions each rank holds.
        length: tokens S.
        rank: whose shard.
        runs: the rows, first and end of each run.
        step: of the rows in runs every so many-th, from the first on.
    """

    layout: Layout
    length: int
    rank: int
    runs: tuple[tuple[int, int], ...]
    step: int = 1

    def positions(self) -> tuple[int, ...]:
        """Their global positions."""
        at = self.layout.positions(self.rank, self.length)
        rows = tuple(p for start, stop in self.runs for p in at[start:stop])
        return rows[:: self.step]

    def __str__(self) -> str:
        runs = "+".join(f"{start}:{stop}" for start, stop in self.runs)
        layout = self.layout
        place = f"{layout.key} {layout.cp_size} {self.length} {self.rank}"
        return f"{place} {runs} {self.step}"

    @classmethod
    def parse(cls, text: str) -> "SomeRows":
        """Read back what ``str`` gave."""
        key, cp_size, length, rank, runs, step = text.split(" ")
        ends = (run.split(":") for run in runs.split("+"))
        return cls(
            Layout.parse(key, int(cp_size)),
            int(length),
            int(rank),
            tuple((int(start), int(stop)) for start, stop in ends),
            int(step),
        )


@dataclass(frozen=True, slots=True)
class ListSpec:
    """Whose blocks are listed.

    Attributes:
        mask: which pairs count; reads no captures.
        num_heads: query heads H.
        q: the queries.
        k: the keys.
    """

    mask: Mask
    num_heads: int
    q: SomeRows
    k: SomeRows

    def __str__(self) -> str:
        return "\n".join(
            map(str, (self.num_heads, self.q, self.k, format_mask(self.mask)))
        )

    @classmethod
    def parse(cls, text: str) -> "ListSpec":
        """Read back what ``str`` gave."""
        num_heads, q, k, mask = text.split("\n")
        rows = SomeRows.parse(q), SomeRows.parse(k)
        return cls(parse_mask(mask), int(num_heads), *rows)


def mark_blocks(
    keeps: Boolean, num_heads: int, q: tuple[int, ...], k: tuple[int, ...]
) -> Tensor:
    """``EMPTY`` blocks, those that the mask decides (``SOME``), and ``FULL`` ones.

    Args:
        keeps: the mask.
        num_heads: query heads H.
        q: positions of queries.
        k: positions of keys.

    Returns:
        int8 ``(H, rows, columns)``; one head if all are alike.
    """
    if H not in keeps.free_symbols:
        num_heads = 1
    if find_tables(keeps) and B not in keeps.free_symbols:
        marks = _mark_by_tables(keeps, num_heads, q, k)
    else:
        heads = (keeps.xreplace({H: sympy.Integer(h)}) for h in range(num_heads))
        marks = torch.stack([_mark(head, q, k) for head in heads])
    return marks[:1] if bool((marks == marks[:1]).all()) else marks


@lru_cache(maxsize=256)
def _mark(keeps: Boolean, q: tuple[int, ...], k: tuple[int, ...]) -> Tensor:
    """Of one head."""
    rows, columns = (_cut(x) for x in (q, k))
    marks = torch.full((len(rows), len(columns)), EMPTY, dtype=torch.int8)
    undecided: list[tuple[int, int]] = []
    boxes = [(0, len(rows), 0, len(columns))]
    while boxes:
        top, bottom, left, right = boxes.pop()
        spans = _find_span(q, top, bottom), _find_span(k, left, right)
        coverage = find_coverage(keeps, *spans).coverage
        height, width = bottom - top, right - left
        if coverage is Coverage.FULL:
            marks[top:bottom, left:right] = FULL
        elif coverage is Coverage.PARTIAL and height == width == 1:
            undecided.append((top, left))
        elif coverage is Coverage.PARTIAL and height >= width:
            middle = top + height // 2
            boxes += [(top, middle, left, right), (middle, bottom, left, right)]
        elif coverage is Coverage.PARTIAL:
            middle = left + width // 2
            boxes += [(top, bottom, left, middle), (top, bottom, middle, right)]
    if len(undecided) > _MOST_LOOKED_AT:  # a mask all over: that is never wrong
        marks[torch.tensor(undecided).unbind(1)] = SOME
        undecided = []
    for start in range(0, len(undecided), _BLOCKS_AT_ONCE):
        some = torch.tensor(undecided[start : start + _BLOCKS_AT_ONCE]).unbind(1)
        marks[some] = _look_at(keeps, rows[some[0]], columns[some[1]])
    return marks


@lru_cache(maxsize=64)
def _mark_by_tables(
    keeps: Boolean, num_heads: int, q: tuple[int, ...], k: tuple[int, ...]
) -> Tensor:
    """All blocks of all heads at once, since no box is decided by a table.

    A block that is not decided by ranges of what it compares is under the mask.
    """
    at = (
        torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        torch.arange(num_heads).view(1, -1, 1, 1),
        torch.tensor(q).view(1, 1, -1, 1),
        torch.tensor(k).view(1, 1, 1, -1),
    )
    tables = [table_values(name) for name in find_tables(keeps)]
    must, may = find_blocks(spell_tables(keeps, 0), Pairs(at, tables, BLOCK))
    found = must[0].to(torch.int8) + may[0]
    return found.expand(num_heads, -1, -1)


def _cut(positions: tuple[int, ...]) -> Tensor:
    """Positions by block, ``(blocks, 128)``; -1 past the end."""
    padded = F.pad(torch.tensor(positions), (0, -len(positions) % BLOCK), value=-1)
    return padded.view(-1, BLOCK)


def _find_span(positions: tuple[int, ...], first: int, stop: int) -> Span:
    """The positions of blocks ``first`` to ``stop``; if no run, all between them."""
    some = positions[first * BLOCK : stop * BLOCK]
    stride = some[1] - some[0] if len(some) > 1 else 1
    if stride > 0 and some == tuple(range(some[0], some[-1] + 1, stride)):
        return Span((0, some[0]), stride, (0, len(some)))
    return Span((0, min(some)), 1, (0, max(some) - min(some) + 1))


def _look_at(keeps: Boolean, q: Tensor, k: Tensor) -> Tensor:
    """What blocks hold, ``(n,)``, of positions ``(n, 128)``."""
    q, k = q[:, :, None], k[:, None]
    exists, none = (q >= 0) & (k >= 0), torch.zeros_like(q)
    must, may = (
        evaluate(replace_unknown(keeps, value), (none, none, q, k)).expand_as(exists)
        for value in (FALSE, TRUE)
    )
    found = (may & exists).flatten(1).any(1).to(torch.int8)
    return found + ((must | ~exists).flatten(1).all(1) & (found > 0))


_Lists = tuple[Tensor, Tensor, Tensor, Tensor]
"""How many blocks under the mask each row has, which, and the same of full ones."""


@lru_cache(maxsize=256)
def _make_lists(text: str) -> tuple[Tensor, ...]:
    """Of each row of blocks which columns, then of each column which rows."""
    spec = ListSpec.parse(text)
    with outside_tracing():
        positions = spec.q.positions(), spec.k.positions()
        marks = mark_blocks(spec.mask.keeps, spec.num_heads, *positions)[None]
        lists = list_blocks(marks == FULL, marks != EMPTY)
        by_direction = _narrow(*lists[:4]), _narrow(*lists[4:])
        return tuple(prepare_upload(x) for found in by_direction for x in found)


def _narrow(some: Tensor, some_at: Tensor, full: Tensor, full_at: Tensor) -> _Lists:
    """Without what lies behind the longest list: heads of their own make many lists.

    Kernels may read both with the strides of one, so they stay of one width; and that
    for a single row of blocks splits it by numbers of blocks, so that one stays whole.
    """
    if some.shape[-1] == 1:
        return some, some_at, full, full_at
    width = max(1, int(some.max()), int(full.max()))
    some_at, full_at = (x[..., :width].contiguous() for x in (some_at, full_at))
    return some, some_at, full, full_at


def _block_lists(text: str, *, device: torch.device) -> list[Tensor]:
    return [upload(x, device) for x in _make_lists(text)]


def _block_list_shapes(text: str, *, device: torch.device) -> list[Tensor]:
    shapes = [x.shape for x in _make_lists(text)]
    return [torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes]


@lru_cache(maxsize=64)
def _make_table(name: str) -> Tensor:
    with outside_tracing():
        return prepare_upload(table_values(name))


def _block_table(name: str, *, device: torch.device) -> Tensor:
    return upload(_make_table(name), device)


def _block_table_shape(name: str, *, device: torch.device) -> Tensor:
    table = _make_table(name)
    return torch.empty(table.shape, dtype=table.dtype, device=device)


ops.LIBRARY.impl("block_lists", _block_lists, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ringcompile::block_lists", _block_list_shapes, lib=ops.LIBRARY
)
ops.LIBRARY.impl("block_table", _block_table, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ringcompile::block_table", _block_table_shape, lib=ops.LIBRARY
)
