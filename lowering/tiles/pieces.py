"""One kernel call of a plan, to the kernel that computes it."""

from functools import reduce

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.schedule import Kernel, Piece
from ringcompile.lowering.program import PartProgram, TileProgram
from ringcompile.lowering.rows import Size, Values, take_rows
from ringcompile.lowering.tiles.dense import attend, attend_backward


def attend_piece(
    part: PartProgram, tile: TileProgram, piece: Piece, q: Tensor, kv: Values
) -> Values:
    """Out and lse of a piece.

    Args:
        part: the part it belongs to.
        tile: the tile it belongs to.
        piece: the rows and the kernel.
        q: the part's queries, ``(B, H, n, D)``.
        kv: the tile's K and V, ``(B, G, m, D)`` and ``(B, G, m, E)``.

    Returns:
        out and lse of the piece's query rows, in the dtype that merges use.
    """
    chunk, scale = part.frame.chunk, part.frame.plan.scale
    q = take_rows(q, piece.q, chunk)
    k, v = (take_rows(x, piece.kv, chunk) for x in kv)
    if _is_dense(part, piece):
        return attend(q, k, v, is_causal=piece.kernel is Kernel.CAUSAL, scale=scale)
    out, lse = ops.MASKED_ATTENTION(
        *(q, k, v, *_positions(part, tile, piece), list(part.captures)),
        mask=part.mask,
        scale=scale,
        block_order=part.frame.plan.block_order,
        **_dropout(part),
    )
    return out, lse


def piece_gradients(
    part: PartProgram, tile: TileProgram, piece: Piece, queries: Values, kv: Values
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a piece.

    Args:
        part: the part it belongs to.
        tile: the tile it belongs to.
        piece: the rows and the kernel.
        queries: gradient of the output, q, merged out and merged lse of the part's
            queries.
        kv: the tile's K and V.

    Returns:
        Gradients of the piece's rows.
    """
    chunk, scale = part.frame.chunk, part.frame.plan.scale
    grad_out, q, out, lse = (take_rows(x, piece.q, chunk) for x in queries)
    k, v = (take_rows(x, piece.kv, chunk) for x in kv)
    tensors = (grad_out, q, k, v, out, lse)
    if _is_dense(part, piece):
        is_causal = piece.kernel is Kernel.CAUSAL
        return attend_backward(*tensors, is_causal=is_causal, scale=scale)
    dq, dk, dv = ops.MASKED_ATTENTION_BACKWARD(
        *(*tensors, *_positions(part, tile, piece), list(part.captures)),
        mask=part.mask,
        scale=scale,
        block_order=part.frame.plan.block_order,
        **_dropout(part),
    )
    return dq, dk, dv


class BlockSums:
    """Gradients of scores, summed over blocks of queries and keys, of one attention."""

    def __init__(self, num_blocks: Size) -> None:
        self._num_blocks = num_blocks
        self._sums: list[Tensor] = []

    def add(
        self, part: PartProgram, tile: TileProgram, queries: Values, kv: Values
    ) -> None:
        """Add those of a tile; arguments as of ``piece_gradients``."""
        plan, chunk = part.frame.plan, part.frame.chunk
        choice = plan.schedule.parts[0].mask.choice
        assert choice is not None, "blocks that are chosen"
        for piece in tile.pieces:
            assert piece.kernel is Kernel.MASKED, "the mask reads the choice"
            grad_out, q, out, lse = (take_rows(x, piece.q, chunk) for x in queries)
            k, v = (take_rows(x, piece.kv, chunk) for x in kv)
            tensors = (grad_out, q, k, v, out, lse, *_positions(part, tile, piece))
            self._sums.append(
                ops.BLOCK_GRADIENTS(
                    *(*tensors, list(part.captures), self._num_blocks, choice.block),
                    mask=part.mask,
                    scale=plan.scale,
                    **_dropout(part),
                )
            )

    def total(self) -> Tensor:
        """Over all tiles, ``(B, H, num_blocks, num_blocks)``."""
        return reduce(torch.add, self._sums)


def _dropout(part: PartProgram) -> dict[str, float]:
    """What ops read of the weights that are dropped; nothing if none are."""
    dropout = part.frame.plan.dropout
    return {} if dropout is None else {"dropout": dropout.rate, "seed": dropout.seed}


def _is_dense(part: PartProgram, piece: Piece) -> bool:
    """Whether a kernel without a mask computes it; that with one takes any piece."""
    return piece.kernel is not Kernel.MASKED and part.frame.plan.is_dense


def _positions(
    part: PartProgram, tile: TileProgram, piece: Piece
) -> tuple[Tensor, Tensor]:
    """Global positions of a piece's queries and keys, ``(heads or 1, n)``."""
    frame = part.frame
    assert tile.reads is not None, "a piece reads rows"
    q_pos = part.queries.positions(frame.positions(frame.plan.rank))
    k_pos = tile.reads.positions(frame.positions(tile.owner))
    return (
        take_rows(q_pos, piece.q, frame.chunk, dim=1),
        take_rows(k_pos, piece.kv, frame.chunk, dim=1),
    )
