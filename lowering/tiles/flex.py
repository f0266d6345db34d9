"""Masked tiles by the kernels that Inductor generates for ``flex_attention``.

The mask is inlined into the kernel; blocks of pairs that never count are passed over.
Invariant: lists of blocks hold every block in which a pair may count, and as full only
those in which all pairs count, whatever captures say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import cast

import torch
import torch.nn.functional as F
from sympy.logic.boolalg import Boolean
from torch import SymInt, Tensor

from ringcompile import ops
from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import Side
from ringcompile.ir.mask import FALSE, TRUE, H, has_captures, is_table
from ringcompile.ir.schedule import Coverage, Piece
from ringcompile.ir.text import parse_mask
from ringcompile.lowering.program import PartProgram, TileProgram
from ringcompile.lowering.rows import Size
from ringcompile.lowering.tiles.block_tables import (
    Pairs,
    Readings,
    find_lists,
    read_ahead,
)
from ringcompile.plan.check_pairs import replace_unknown
from ringcompile.plan.coverage import Span, find_coverage
from ringcompile.torch_private import (
    BlockLists,
    flex_backward,
    flex_forward,
    is_traced,
    outside_tracing,
)

BLOCK = 128
_BLOCKS_AT_ONCE, _MOST_LOOKED_AT = 64, 4096
_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_SIZES = (16, 32, 64, 128, 256)
_LN_2 = log(2.0)


def takes(part: PartProgram, q: Tensor, v: Tensor) -> bool:
    """Whether these kernels compute a piece.

    None of a plan that changes scores: they could, as long as no bias has a gradient,
    but so far plain operators do.

    Args:
        part: the part it belongs to.
        q: its queries.
        v: its values.
    """
    plan = part.frame.plan
    mask = parse_mask(part.mask)
    if plan.kernel == "math" or plan.dropout is not None or part.is_selected:
        return False
    if plan.changes_scores:
        return False
    if mask.choice is not None or any(map(is_table, mask.keeps.atoms())):
        return False
    if plan.block_order != "natural":  # programs of a kernel start in no such order
        return False
    if plan.kernel == "flex":
        return True
    fits = q.dtype in _DTYPES and {q.shape[-1], v.shape[-1]} <= set(_HEAD_SIZES)
    return fits and q.is_cuda and is_traced()


@dataclass(frozen=True, slots=True)
class _Masking:
    """What both directions read of a mask: its blocks, and what it is evaluated on."""

    lists: BlockLists
    readings: Readings

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """What ``mask_mod`` reads."""
        return self.readings.captures

    def mask_mod(
        self, b: Tensor, h: Tensor, row: Tensor, column: Tensor, *captures: Tensor
    ) -> Tensor:
        """Whether one pair counts."""
        return evaluate(
            self.readings.keeps,
            (b, h, row, column),
            captures,
            is_within=self.readings.is_within,
        )


def attend(
    part: PartProgram,
    tile: TileProgram,
    piece: Piece,
    qkv: tuple[Tensor, Tensor, Tensor],
    positions: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Out and lse of a piece, float32.

    Args:
        part: the part it belongs to.
        tile: the tile it belongs to.
        piece: its rows.
        qkv: q, k and v of its rows.
        positions: of its queries and keys, ``(1, n)``.
    """
    masking = _build_masking(part, tile, piece, qkv[0].shape[:2], positions)
    out, lse = flex_forward(
        *qkv,
        masking.lists,
        masking.mask_mod,
        masking.buffers,
        scale=part.frame.plan.scale,
    )
    dtype = ops.accumulation_dtype(out.dtype)
    return out.to(dtype), lse.to(dtype) * _LN_2


def attend_backward(
    part: PartProgram,
    tile: TileProgram,
    piece: Piece,
    tensors: Sequence[Tensor],
    positions: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a piece; ``tensors`` as of ``dense.attend_backward``."""
    grad_out, q, k, v, out, lse = tensors
    masking = _build_masking(part, tile, piece, q.shape[:2], positions)
    return flex_backward(
        *(q, k, v, out, lse / _LN_2, grad_out),
        masking.lists,
        masking.mask_mod,
        masking.buffers,
        scale=part.frame.plan.scale,
    )


def _build_masking(
    part: PartProgram,
    tile: TileProgram,
    piece: Piece,
    sizes: Sequence[Size],
    positions: tuple[Tensor, Tensor],
) -> _Masking:
    """``sizes``: how many batches and heads there are."""
    q_pos, k_pos = (x[0] for x in positions)
    mask = parse_mask(part.mask)
    schedule = part.frame.plan.schedule
    b, h = (_count_up(size, q_pos.device) for size in sizes)
    q_at, k_at = q_pos.view(1, 1, -1, 1), k_pos.view(1, 1, 1, -1)
    at = (b.view(-1, 1, 1, 1), h.view(1, -1, 1, 1), q_at, k_at)
    pairs = Pairs(at, part.captures, BLOCK)
    is_open = None in (schedule.q_side.length, schedule.kv_side.length)
    if has_captures(mask.keeps):
        lists = find_lists(mask.keeps, pairs)
    elif is_open:
        lists = _list_all(q_pos, k_pos)
    else:
        known = _find_positions(part, tile, piece)
        with outside_tracing():
            text = _list_blocks(mask.keeps, int(sizes[1]), *known)
        lists = BlockLists(*ops.BLOCK_LISTS(text, device=q_pos.device))
    return _Masking(lists, read_ahead(mask.keeps, pairs))


def _count_up(size: Size, device: torch.device) -> Tensor:
    return torch.arange(cast("int", size), device=device)  # or symbolic


def _find_positions(
    part: PartProgram, tile: TileProgram, piece: Piece
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of a piece's queries and keys, as numbers."""
    plan = part.frame.plan
    q_at, q_chunk = _read_side(plan.schedule.q_side, plan.rank)
    k_at, chunk = _read_side(plan.schedule.kv_side, tile.owner)
    rows = [n for run in tile.needs for n in range(*run.resolve(chunk))]
    q_rows, k_rows = slice(*piece.q.resolve(q_chunk)), slice(*piece.kv.resolve(chunk))
    return q_at[q_rows], tuple(k_at[n] for n in rows[k_rows])


def _read_side(side: Side, rank: int) -> tuple[tuple[int, ...], int]:
    """Positions of a rank's rows, and the chunk length."""
    assert side.length is not None, "lists of blocks are of known lengths"
    layout = side.layout
    return layout.positions(rank, side.length), layout.chunk_size(side.length)


# ---- lists of blocks -----------------------------------------------------------------


def _list_all(q_pos: Tensor, k_pos: Tensor) -> BlockLists:
    """Every block, under the mask: where the length is open."""
    sizes = tuple(_count(x.shape[0]) for x in (q_pos, k_pos))
    made: list[Tensor] = []
    for num_rows, num_columns in (sizes, sizes[::-1]):
        none = q_pos.new_full((1, 1, num_rows), 0, dtype=torch.int32)
        every = cast("int", num_columns)  # or symbolic
        columns = torch.arange(every, dtype=torch.int32, device=q_pos.device)
        indices = columns.expand(1, 1, num_rows, -1).contiguous()
        made += [none + every, indices, none, indices]
    return BlockLists(*made)


def _count(rows: Size) -> int | SymInt:
    return (rows + BLOCK - 1) // BLOCK


@lru_cache(maxsize=256)
def _list_blocks(
    keeps: Boolean, num_heads: int, q: tuple[int, ...], k: tuple[int, ...]
) -> str:
    """Of each row of blocks those under the mask, then the full ones, as text."""
    rows, columns = (_cut(x) for x in (q, k))
    kept = torch.zeros(len(rows), len(columns), dtype=torch.int8)
    undecided: list[tuple[int, int]] = []
    boxes = [(0, len(rows), 0, len(columns))]
    while boxes:
        top, bottom, left, right = boxes.pop()
        spans = _find_span(q, top, bottom), _find_span(k, left, right)
        coverage = find_coverage(keeps, *spans).coverage
        height, width = bottom - top, right - left
        if coverage is Coverage.FULL:
            kept[top:bottom, left:right] = _FULL
        elif coverage is Coverage.PARTIAL and height == width == 1:
            undecided.append((top, left))
        elif coverage is Coverage.PARTIAL and height >= width:
            middle = top + height // 2
            boxes += [(top, middle, left, right), (middle, bottom, left, right)]
        elif coverage is Coverage.PARTIAL:
            middle = left + width // 2
            boxes += [(top, bottom, left, middle), (top, bottom, middle, right)]
    if len(undecided) > _MOST_LOOKED_AT:  # a mask all over: that is never wrong
        kept[torch.tensor(undecided).unbind(1)] = _SOME
        undecided = []
    for start in range(0, len(undecided), _BLOCKS_AT_ONCE):
        some = torch.tensor(undecided[start : start + _BLOCKS_AT_ONCE]).unbind(1)
        kept[some] = _look_at(keeps, num_heads, rows[some[0]], columns[some[1]])
    lines = (
        ";".join(_format((row == n).nonzero()[:, 0].tolist()) for n in (_SOME, _FULL))
        for row in kept
    )
    return "\n".join([str(len(columns)), *lines])


_SOME, _FULL = 1, 2


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


def _look_at(keeps: Boolean, num_heads: int, q: Tensor, k: Tensor) -> Tensor:
    """What blocks hold, ``(n,)``, of positions ``(n, 128)``; heads together."""
    exists = (q >= 0)[:, None, :, None] & (k >= 0)[:, None, None, :]
    heads = torch.arange(num_heads if H in keeps.free_symbols else 1)
    heads = heads.view(1, -1, 1, 1)
    at = (torch.zeros_like(heads), heads, q[:, None, :, None], k[:, None, None, :])
    must, may = (evaluate(replace_unknown(keeps, value), at) for value in (FALSE, TRUE))
    is_full, is_some = must | ~exists, may & exists
    size = (len(q), heads.shape[1], BLOCK, BLOCK)
    found = is_some.expand(size).flatten(1).any(1).to(torch.int8)
    return found + (is_full.expand(size).flatten(1).all(1) & (found > 0))


def _format(numbers: list[int]) -> str:
    """Runs of numbers: ``0-3,7-7``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}-{b}" for a, b in runs)


def _parse(text: str) -> list[int]:
    runs = (run.split("-") for run in text.split(",") if run)
    return [n for a, b in runs for n in range(int(a), int(b) + 1)]


@lru_cache(maxsize=256)
def _make_lists(text: str) -> tuple[Tensor, ...]:
    """Of each row of blocks which columns, then of each column which rows."""
    columns, *lines = text.split("\n")
    pairs = [line.split(";") for line in lines]
    by_row = [list(map(_parse, lists)) for lists in zip(*pairs, strict=True)]
    by_column = [_transpose(rows, int(columns)) for rows in by_row]
    made: list[Tensor] = []
    for lists, size in ((by_row, int(columns)), (by_column, len(lines))):
        for numbers in lists:
            made += _as_tensors(numbers, size)
    return tuple(made)


def _transpose(rows: Sequence[Sequence[int]], num_columns: int) -> list[list[int]]:
    columns: list[list[int]] = [[] for _ in range(num_columns)]
    for n, row in enumerate(rows):
        for column in row:
            columns[column].append(n)
    return columns


def _as_tensors(lists: Sequence[Sequence[int]], size: int) -> tuple[Tensor, Tensor]:
    """How many each list has, and which; behind those the others, as torch has it."""
    order = [[*row, *sorted(set(range(size)) - set(row))] for row in lists]
    counts = torch.tensor(list(map(len, lists)), dtype=torch.int32)
    return counts[None, None], torch.tensor(order, dtype=torch.int32)[None, None]


def _block_lists(text: str, *, device: torch.device) -> list[Tensor]:
    return [x.to(device, copy=True) for x in _make_lists(text)]


def _block_list_shapes(text: str, *, device: torch.device) -> list[Tensor]:
    rows, columns = text.count("\n"), int(text.split("\n", 1)[0])
    shapes = [(1, 1, rows), (1, 1, rows, columns)] * 2
    shapes += [(1, 1, columns), (1, 1, columns, rows)] * 2
    return [torch.empty(s, dtype=torch.int32, device=device) for s in shapes]


ops.LIBRARY.impl("block_lists", _block_lists, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ringcompile::block_lists", _block_list_shapes, lib=ops.LIBRARY
)
