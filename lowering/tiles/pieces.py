"""One kernel call of a plan, to the kernel that computes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.schedule import Kernel, Piece
from ringcompile.lowering.bias_sums import BiasSums
from ringcompile.lowering.calls import Call
from ringcompile.lowering.program import PartProgram, TileProgram
from ringcompile.lowering.rows import Size, Values, take_rows
from ringcompile.lowering.tiles import flex
from ringcompile.lowering.tiles.dense import attend, attend_backward

_MOST_CLASSES_APART = 8
"""Of more, calls for each take the host longer than a copy of all takes a GPU. H200, 4
classes of 8,192 rows, runs of 1,024, 32:8 heads, ms: forward .20 to copy and .55, apart
.60; backward 2.17 and the copies of five tensors, apart 2.33."""


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
    k, v = (take_rows(x, piece.kv, part.frame.kv_chunk) for x in kv)
    view = View.of(piece, q)
    if _is_dense(part, piece):
        is_causal = piece.kernel is Kernel.CAUSAL
        kernel = partial(attend, is_causal=is_causal, scale=scale)
        out, lse = view.call_kernel(kernel, (q, k, v))
        return view.put_queries(out.to(ops.accumulation_dtype(q.dtype)), lse)
    q, k, v = map(view.take, (q, k, v))
    if flex.takes(part, q, v):
        positions = _positions(part, tile, view.call)
        out, lse = flex.attend(part, tile, view.call, (q, k, v), positions)
    else:
        out, lse = ops.MASKED_ATTENTION(
            *(q, k, v, *_positions(part, tile, view.call), *_read(part, piece)),
            mask=part.mask_of(piece),
            scale=scale,
            block_order=part.frame.plan.block_order,
            **_options(part),
        )
    return view.put_queries(out, lse)


def piece_gradients(
    part: PartProgram,
    tile: TileProgram,
    piece: Piece,
    queries: Values,
    kv: Values,
    of_biases: BiasSums,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a piece.

    Args:
        part: the part it belongs to.
        tile: the tile it belongs to.
        piece: the rows and the kernel.
        queries: gradient of the output, q, merged out and merged lse of the part's
            queries.
        kv: the tile's K and V.
        of_biases: where the piece's gradients of biases are added.

    Returns:
        Gradients of the piece's rows.
    """
    chunk, scale = part.frame.chunk, part.frame.plan.scale
    grad_out, q, out, lse = (take_rows(x, piece.q, chunk) for x in queries)
    k, v = (take_rows(x, piece.kv, part.frame.kv_chunk) for x in kv)
    view = View.of(piece, q)
    tensors = (grad_out, q, k, v, out, lse)
    if _is_dense(part, piece):
        is_causal = piece.kernel is Kernel.CAUSAL
        kernel = partial(attend_backward, is_causal=is_causal, scale=scale)
        return view.put_gradients(*view.call_kernel(kernel, tensors))
    taken = tuple(map(view.take, tensors))
    if flex.takes(part, q, v):
        positions = _positions(part, tile, view.call)
        dq, dk, dv = flex.attend_backward(part, tile, view.call, taken, positions)
    else:
        positions = _positions(part, tile, view.call)
        dq, dk, dv, *d_biases = ops.MASKED_ATTENTION_BACKWARD(
            *(*taken, *positions, *_read(part, piece)),
            mask=part.mask_of(piece),
            scale=scale,
            block_order=part.frame.plan.block_order,
            learned=[n for n, bias in enumerate(part.biases) if bias.is_learned],
            **_options(part),
        )
        of_biases.add(piece, positions[1], tuple(d_biases))
    return view.put_gradients(dq, dk, dv)


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
            positions = _positions(part, tile, View.of(piece, q).call)
            tensors = (grad_out, q, k, v, out, lse, *positions)
            self._sums.append(
                ops.BLOCK_GRADIENTS(
                    *(*tensors, *_read(part, piece), self._num_blocks, choice.block),
                    mask=part.mask,
                    scale=plan.scale,
                    **_options(part),
                )
            )

    def total(self) -> Tensor:
        """Over all tiles, ``(B, H, num_blocks, num_blocks)``."""
        return reduce(torch.add, self._sums)


def _read(part: PartProgram, piece: Piece) -> tuple[list[Tensor], list[Tensor]]:
    """Captures, and biases of the piece's queries."""
    biases = [
        take_rows(bias.tensor, piece.q, part.frame.chunk)
        if bias.traits.is_cut
        else bias.tensor
        for bias in part.biases
    ]
    return list(part.captures), biases


def _options(part: PartProgram) -> dict[str, object]:
    """What ops read of what is done to scores and weights; what is not is not named."""
    plan, options = part.frame.plan, dict[str, object]()
    if plan.dropout is not None:
        options |= {"dropout": plan.dropout.rate, "seed": plan.dropout.seed}
    if plan.changes_scores:
        relative = [n for n, x in enumerate(part.biases) if x.traits.is_relative]
        options |= {"softcap": plan.softcap, "relative": relative}
    return options


@dataclass(frozen=True, slots=True)
class View:
    """The rows and heads of a call as a kernel takes them: groups, classes as batches.

    Attributes:
        call: the runs of rows, and the query heads that take part.
        num_heads: H.
    """

    call: Call
    num_heads: int

    @classmethod
    def of(cls, piece: Piece, q: Tensor) -> "View":
        """Of a piece; one that is no ``Call`` has one group of all heads."""
        call = piece
        if not isinstance(call, Call):
            call = Call(piece.q, piece.kv, piece.kernel)
        return cls(call, q.shape[1])

    def take(self, x: Tensor) -> Tensor:
        """Its heads of ``(B, heads, n, ...)``, every run of every class a batch."""
        groups, gap, classes = self.call.groups, self.call.gap, self.call.classes
        if self.call.heads is not None:
            first, stop = self._scaled(x.shape[1])
            x = x[:, first:stop]
        if classes > 1:
            x = x.unflatten(2, (-1, classes)).movedim(3, 1).flatten(0, 1)
        if groups > 1:
            x = _with_gap_behind(x, gap, 0.0).unflatten(2, (groups, -1))
            x = x.narrow(3, 0, x.shape[3] - gap).transpose(1, 2).flatten(0, 1)
        # Upside down, the rows from the diagonal on are those up to it.
        return x.flip(2) if self.call.is_upper else x

    def call_kernel(
        self, kernel: Callable[..., Values], tensors: Sequence[Tensor]
    ) -> Values:
        """What a kernel makes of these, taken; its results are to be put.

        Runs of several classes as one batch would be copied first; those of one class
        are read where they lie, by a call for each.
        """
        call = self.call
        are_apart = 1 < call.classes <= _MOST_CLASSES_APART and call.groups > 1
        if not are_apart or call.gap or call.is_upper:
            return kernel(*map(self.take, tensors))
        one = replace(self, call=replace(call, classes=1))
        by_class = [x.unflatten(2, (-1, call.classes)).unbind(3) for x in tensors]
        results = [kernel(*map(one.take, own)) for own in zip(*by_class, strict=True)]
        return tuple(
            torch.stack([x.unflatten(0, (-1, call.groups)) for x in xs], 1).flatten(
                0, 2
            )
            for xs in zip(*results, strict=True)
        )

    def put_queries(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Undo ``take`` on out and lse; heads left out see nothing."""
        return self._put(out, self.num_heads), self._put(
            lse, self.num_heads, fill=-torch.inf
        )

    def put_gradients(
        self, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Undo ``take`` on gradients; those of heads left out are zero."""
        shared = dq.shape[1] // dk.shape[1]
        num_kv_heads = self.num_heads // shared
        return (
            self._put(dq, self.num_heads),
            self._put(dk, num_kv_heads),
            self._put(dv, num_kv_heads),
        )

    def _put(self, x: Tensor, num_heads: int, *, fill: float = 0.0) -> Tensor:
        groups, gap, classes = self.call.groups, self.call.gap, self.call.classes
        if self.call.is_upper:
            x = x.flip(2)
        if groups > 1:
            x = _with_gap_behind(x, gap, fill).unflatten(0, (-1, groups))
            x = x.transpose(1, 2).flatten(2, 3)
            x = x.narrow(2, 0, x.shape[2] - gap)
        if classes > 1:
            x = x.unflatten(0, (-1, classes)).movedim(1, 3).flatten(2, 3)
        if self.call.heads is None:
            return x
        first, stop = self._scaled(num_heads)
        before = x.new_full((x.shape[0], first, *x.shape[2:]), fill)
        after = x.new_full((x.shape[0], num_heads - stop, *x.shape[2:]), fill)
        return torch.cat([before, x, after], 1)

    def _scaled(self, num_heads: int) -> tuple[int, int]:
        heads = self.call.heads
        assert heads is not None, "some heads are left out"
        shared = self.num_heads // num_heads
        return heads[0] // shared, heads[1] // shared


def _with_gap_behind(x: Tensor, gap: int, fill: float) -> Tensor:
    """``(B, H, n, ...)`` with so many rows more."""
    if not gap:
        return x
    return torch.cat([x, x.new_full((*x.shape[:2], gap, *x.shape[3:]), fill)], 2)


def _is_dense(part: PartProgram, piece: Piece) -> bool:
    """Whether a kernel without a mask computes it; one with takes whole rows."""
    plan = part.frame.plan
    if piece.kernel is Kernel.MASKED or not plan.is_dense:
        return False
    return plan.kernel != "flex" or part.is_selected


def _positions(
    part: PartProgram, tile: TileProgram, call: Call
) -> tuple[Tensor, Tensor]:
    """Global positions of a call's queries and keys, ``(heads or 1, n)``.

    Those of the first of its classes, which its mask reads.
    """
    frame = part.frame
    assert tile.reads is not None, "a piece reads rows"
    assert call.groups == 1, "a kernel with a mask takes whole rows"
    assert call.heads is None, "and all heads"
    q_pos = part.queries.positions(frame.q_positions())
    k_pos = tile.reads.positions(frame.kv_positions(tile.owner))
    q_pos = take_rows(q_pos, call.q, frame.chunk, dim=1)
    k_pos = take_rows(k_pos, call.kv, frame.kv_chunk, dim=1)
    if call.classes == 1:
        return q_pos, k_pos
    return q_pos[:, :: call.classes], k_pos[:, :: call.classes]
