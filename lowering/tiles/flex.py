"""Masked tiles by the kernels that Inductor generates for ``flex_attention``.

The mask is inlined into the kernel; blocks of pairs that never count are passed over.
Invariant: lists of blocks hold every block in which a pair may count, and as full only
those in which all pairs count, whatever captures say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import cast

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import Layout, Side
from ringcompile.ir.mask import has_captures
from ringcompile.ir.schedule import Rows
from ringcompile.ir.text import parse_mask
from ringcompile.lowering.calls import Call
from ringcompile.lowering.program import PartProgram, TileProgram
from ringcompile.lowering.rows import Size
from ringcompile.lowering.tiles.block_lists import BLOCK, ListSpec, SomeRows
from ringcompile.lowering.tiles.block_tables import (
    Pairs,
    Readings,
    find_lists,
    find_tables,
    read_ahead,
    spell_tables,
)
from ringcompile.torch_private import (
    BlockLists,
    flex_backward,
    flex_forward,
    has_flex_kernel,
)

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
    if mask.choice is not None:
        return False
    if plan.block_order != "natural":  # programs of a kernel start in no such order
        return False
    if plan.kernel == "flex":
        return True
    return has_flex_kernel(q, v)


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
    call: Call,
    qkv: tuple[Tensor, Tensor, Tensor],
    positions: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Out and lse of a call, float32.

    Args:
        part: the part it belongs to.
        tile: the tile it belongs to.
        call: its rows; its classes are batches.
        qkv: q, k and v of its rows.
        positions: of its queries and keys, ``(1, n)``.
    """
    masking = _build_masking(part, tile, call, qkv[0].shape[:2], positions)
    out, lse = flex_forward(
        *qkv,
        masking.lists,
        masking.mask_mod,
        masking.buffers,
        scale=part.frame.plan.scale,
        fills_blocks=_fills_blocks(part, call, qkv[:2]),
    )
    dtype = ops.accumulation_dtype(out.dtype)
    return out.to(dtype), lse.to(dtype) * _LN_2


def attend_backward(
    part: PartProgram,
    tile: TileProgram,
    call: Call,
    tensors: Sequence[Tensor],
    positions: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a call; ``tensors`` as of ``dense.attend_backward``."""
    grad_out, q, k, v, out, lse = tensors
    # The kernel takes it for contiguous, and Inductor would lay it out as it is read.
    lse = ops.STORE((lse / _LN_2).contiguous())
    masking = _build_masking(part, tile, call, q.shape[:2], positions)
    return flex_backward(
        *(q, k, v, out, lse, grad_out),
        masking.lists,
        masking.mask_mod,
        masking.buffers,
        scale=part.frame.plan.scale,
        fills_blocks=_fills_blocks(part, call, (q, k)),
    )


def _fills_blocks(part: PartProgram, call: Call, qk: Sequence[Tensor]) -> bool:
    """Whether its rows are whole blocks; of an open length what chunks say of them."""

    def fills(of: Rows, rows: Size) -> bool:
        if isinstance(rows, int):
            return rows % BLOCK == 0
        return part.frame.fills_blocks and (of.stop[1] - of.start[1]) % BLOCK == 0

    return all(
        fills(of, x.shape[2]) for of, x in zip((call.q, call.kv), qk, strict=True)
    )


def _build_masking(
    part: PartProgram,
    tile: TileProgram,
    call: Call,
    sizes: Sequence[Size],
    positions: tuple[Tensor, Tensor],
) -> _Masking:
    """``sizes``: how many batches and heads there are."""
    q_pos, k_pos = (x[0] for x in positions)
    mask = parse_mask(part.mask_of(call))
    schedule = part.frame.plan.schedule
    b, h = (_count_up(size, q_pos.device) for size in sizes)
    q_at, k_at = q_pos.view(1, 1, -1, 1), k_pos.view(1, 1, 1, -1)
    at = (b.view(-1, 1, 1, 1), h.view(1, -1, 1, 1), q_at, k_at)
    tables = [
        ops.BLOCK_TABLE(name, device=q_pos.device) for name in find_tables(mask.keeps)
    ]
    keeps = spell_tables(mask.keeps, len(part.captures))
    pairs = Pairs(at, (*part.captures, *tables), BLOCK)
    is_open = None in (schedule.q_side.length, schedule.kv_side.length)
    if has_captures(mask.keeps) or is_open:
        lists = find_lists(keeps, pairs)
    else:
        spec = ListSpec(mask, int(sizes[1]), *_find_rows(part, tile, call))
        lists = BlockLists(*ops.BLOCK_LISTS(str(spec), device=q_pos.device))
    return _Masking(lists, read_ahead(keeps, pairs))


def _count_up(size: Size, device: torch.device) -> Tensor:
    return torch.arange(cast("int", size), device=device)  # or symbolic


def _find_rows(
    part: PartProgram, tile: TileProgram, call: Call
) -> tuple[SomeRows, SomeRows]:
    """A call's queries and keys, of known lengths; of classes those of the first."""
    plan = part.frame.plan
    (q_layout, q_length), (layout, length) = (
        _read_side(side) for side in (plan.schedule.q_side, plan.schedule.kv_side)
    )
    q_rows = call.q.resolve(q_layout.chunk_size(q_length))
    chunk = layout.chunk_size(length)
    start, stop = call.kv.resolve(chunk)
    runs, before = [], 0
    for run in tile.needs:  # laid end to end
        first, end = run.resolve(chunk)
        a, b = (min(max(n - before, 0), end - first) for n in (start, stop))
        runs += [(first + a, first + b)] if a < b else []
        before += end - first
    return (
        SomeRows(q_layout, q_length, plan.rank, (q_rows,), call.classes),
        SomeRows(layout, length, tile.owner, tuple(runs), call.classes),
    )


def _read_side(side: Side) -> tuple[Layout, int]:
    assert side.length is not None, "lists of blocks are of known lengths"
    return side.layout, side.length
