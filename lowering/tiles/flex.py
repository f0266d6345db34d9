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
from sympy.logic.boolalg import Boolean
from torch import SymInt, Tensor

from ringcompile import ops
from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import FALSE, TRUE, H, is_table
from ringcompile.ir.schedule import Piece
from ringcompile.ir.text import parse_mask
from ringcompile.lowering.program import PartProgram, TileProgram
from ringcompile.lowering.rows import Size
from ringcompile.plan.check_pairs import replace_unknown
from ringcompile.torch_private import (
    BlockLists,
    flex_backward,
    flex_forward,
    is_traced,
    outside_tracing,
)

BLOCK = 128
_ROWS_AT_ONCE = 1 << 22  # pairs
_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_SIZES = (16, 32, 64, 128, 256)
_LN_2 = log(2.0)

_read_mask = lru_cache(maxsize=256)(parse_mask)


def takes(part: PartProgram, q: Tensor, v: Tensor, *, is_dense: bool) -> bool:
    """Whether these kernels compute a piece.

    Args:
        part: the part it belongs to.
        q: its queries.
        v: its values.
        is_dense: whether kernels without a mask could.
    """
    plan = part.frame.plan
    mask = _read_mask(part.mask)
    if plan.kernel == "math" or plan.dropout is not None or part.is_selected:
        return False
    if mask.choice is not None or any(map(is_table, mask.keeps.atoms())):
        return False
    if plan.kernel == "flex":
        return True
    fits = q.dtype in _DTYPES and {q.shape[-1], v.shape[-1]} <= set(_HEAD_SIZES)
    return not is_dense and fits and q.is_cuda and is_traced()


@dataclass(frozen=True, slots=True)
class _Masking:
    """What both directions read of a mask: its blocks, and what it is evaluated on."""

    lists: BlockLists
    keeps: Boolean
    buffers: tuple[Tensor, ...]

    def mask_mod(
        self,
        b: Tensor,
        h: Tensor,
        row: Tensor,
        column: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        *captures: Tensor,
    ) -> Tensor:
        """Whether one pair counts."""
        return evaluate(self.keeps, (b, h, q_pos[row], k_pos[column]), captures)


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
    masking = _build_masking(part, tile, piece, qkv[0].shape[1], positions)
    out, lse = flex_forward(
        *qkv,
        masking.lists,
        masking.mask_mod,
        masking.buffers,
        scale=part.frame.plan.scale,
    )
    return out.to(ops.accumulation_dtype(out.dtype)), lse * _LN_2


def attend_backward(
    part: PartProgram,
    tile: TileProgram,
    piece: Piece,
    tensors: Sequence[Tensor],
    positions: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a piece; ``tensors`` as of ``dense.attend_backward``."""
    grad_out, q, k, v, out, lse = tensors
    masking = _build_masking(part, tile, piece, q.shape[1], positions)
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
    num_heads: int,
    positions: tuple[Tensor, Tensor],
) -> _Masking:
    q_pos, k_pos = (x[0] for x in positions)
    mask = _read_mask(part.mask)
    length = part.frame.plan.schedule.length
    if length is None:
        lists = _list_all(q_pos, k_pos)
    else:
        known = _find_positions(part, tile, piece, length)
        with outside_tracing():
            text = _list_blocks(mask.keeps, num_heads, *known)
        lists = BlockLists(*ops.BLOCK_LISTS(text, device=q_pos.device))
    return _Masking(lists, mask.keeps, (q_pos, k_pos, *part.captures))


def _find_positions(
    part: PartProgram, tile: TileProgram, piece: Piece, length: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of a piece's queries and keys, as numbers."""
    layout, rank = part.frame.plan.schedule.layout, part.frame.plan.rank
    chunk = layout.chunk_size(length)
    q_at, k_at = (layout.positions(r, length) for r in (rank, tile.owner))
    rows = [n for run in tile.needs for n in range(*run.resolve(chunk))]
    q_rows, k_rows = slice(*piece.q.resolve(chunk)), slice(*piece.kv.resolve(chunk))
    return q_at[q_rows], tuple(k_at[n] for n in rows[k_rows])


# ---- lists of blocks -----------------------------------------------------------------


def _list_all(q_pos: Tensor, k_pos: Tensor) -> BlockLists:
    """Every block, under the mask: where the length is open."""
    num_rows, num_columns = _count(q_pos.shape[0]), _count(k_pos.shape[0])
    counts = q_pos.new_full((1, 1, num_rows), 0, dtype=torch.int32)
    every = cast("int", num_columns)  # or symbolic
    columns = torch.arange(every, dtype=torch.int32, device=q_pos.device)
    indices = columns.expand(1, 1, num_rows, -1).contiguous()
    return BlockLists(counts + every, indices, counts, indices)


def _count(rows: Size) -> int | SymInt:
    return (rows + BLOCK - 1) // BLOCK


@lru_cache(maxsize=256)
def _list_blocks(
    keeps: Boolean, num_heads: int, q: tuple[int, ...], k: tuple[int, ...]
) -> str:
    """For each row of blocks those under the mask, then the full ones, as text."""
    q_pos, k_pos = torch.tensor(q), torch.tensor(k)
    must, may = (replace_unknown(keeps, value) for value in (FALSE, TRUE))
    columns = _count(len(k))
    size = max(1, _ROWS_AT_ONCE // (BLOCK * max(1, len(k))))
    lines = [str(columns)]
    for start in range(0, len(q), BLOCK * size):
        rows = q_pos[start : start + BLOCK * size]
        is_full, is_some = (
            _reduce(p, rows, k_pos, num_heads, by_all=by_all)
            for p, by_all in ((must, True), (may, False))
        )
        for full, some in zip(is_full, is_some, strict=True):
            partial = (some & ~full).nonzero()[:, 0].tolist()
            whole = full.nonzero()[:, 0].tolist()
            lines.append(f"{_format(partial)};{_format(whole)}")
    return "\n".join(lines)


def _reduce(
    p: Boolean, q: Tensor, k: Tensor, num_heads: int, *, by_all: bool
) -> Tensor:
    """Whether all or any pairs of each block count; heads are looked at together."""
    count = num_heads if H in p.free_symbols else 1
    heads = torch.arange(count).view(-1, 1, 1)
    found = evaluate(p, (torch.zeros_like(heads), heads, q[:, None], k[None]))
    found = found.expand(count, len(q), len(k))
    found = found.all(0) if by_all else found.any(0)
    pad = (0, -len(k) % BLOCK, 0, -len(q) % BLOCK)
    found = torch.nn.functional.pad(found, pad, value=by_all)
    blocks = found.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    kept: Tensor = blocks.all(3).all(1) if by_all else blocks.any(3).any(1)
    return kept


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
def _make_lists(text: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns, *lines = text.split("\n")
    pairs = [line.split(";") for line in lines]
    made: list[Tensor] = []
    for lists in zip(*pairs, strict=True):
        numbers = [_parse(numbers) for numbers in lists]
        # Behind the listed ones come the others, as torch's own lists have it.
        order = [
            [*row, *sorted(set(range(int(columns))) - set(row))] for row in numbers
        ]
        counts = torch.tensor(list(map(len, numbers)), dtype=torch.int32)
        made += [counts[None, None], torch.tensor(order, dtype=torch.int32)[None, None]]
    first, second, third, fourth = made
    return first, second, third, fourth


def _block_lists(text: str, *, device: torch.device) -> list[Tensor]:
    return [x.to(device, copy=True) for x in _make_lists(text)]


def _block_list_shapes(text: str, *, device: torch.device) -> list[Tensor]:
    rows, columns = text.count("\n"), int(text.split("\n", 1)[0])
    shapes = ((1, 1, rows), (1, 1, rows, columns)) * 2
    return [torch.empty(s, dtype=torch.int32, device=device) for s in shapes]


ops.LIBRARY.impl("block_lists", _block_lists, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ringcompile::block_lists", _block_list_shapes, lib=ops.LIBRARY
)
