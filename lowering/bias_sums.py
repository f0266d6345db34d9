"""Gradients of biases, summed up over the tiles of a part.

Invariant: beside the sums, which are as large as the biases, there is one tile's share.
"""

import torch
from torch import Tensor

from ringcompile.ir.schedule import Piece
from ringcompile.lowering.program import PartProgram
from ringcompile.lowering.rows import Values, take_rows
from ringcompile.lowering.scores import PartBias


class BiasSums:
    """Those of one part."""

    def __init__(self, part: PartProgram, dtype: torch.dtype) -> None:
        self._part = part
        self._learned = [bias for bias in part.biases if bias.is_learned]
        self._sums = [_zeros(bias, dtype) for bias in self._learned]

    def add(self, piece: Piece, k_pos: Tensor, gradients: Values) -> None:
        """Add a piece's.

        Args:
            piece: whose.
            k_pos: global positions of its keys, ``(H or G or 1, m)``, -1 for no row.
            gradients: one for each bias that is learned, as
                ``ops.MASKED_ATTENTION_BACKWARD`` gives them.
        """
        chunk = self._part.frame.chunk
        for bias, total, added in zip(
            self._learned, self._sums, gradients, strict=True
        ):
            rows = take_rows(total, piece.q, chunk) if bias.traits.is_cut else total
            if not bias.has_column_per_key:
                rows += added
                continue
            last = total.shape[3] - 1
            columns = k_pos.masked_fill(k_pos < 0, last)
            if columns.shape[0] != 1:
                shared = added.shape[1] // columns.shape[0]
                columns = columns.repeat_interleave(shared, 0)
            # No two of a row meet, so that any order of adding gives the same bits.
            rows.scatter_add_(3, columns[None, :, None].expand_as(added), added)

    def place(self) -> Values:
        """The sums over all the rank's queries, each in the shape of its bias."""
        return tuple(map(self._place, self._learned, self._sums))

    def _place(self, bias: PartBias, total: Tensor) -> Tensor:
        if bias.has_column_per_key:
            total = total.narrow(3, 0, total.shape[3] - 1)
        if bias.traits.is_cut:
            _, (total,) = self._part.queries.place((total,))
        return total.sum(1, keepdim=True) if bias.is_spread else total


def _zeros(bias: PartBias, dtype: torch.dtype) -> Tensor:
    """Sums; where a column is one key's, with one more for rows that are none."""
    *shape, columns = bias.tensor.shape
    if bias.has_column_per_key:
        columns += 1
    return bias.tensor.new_zeros((*shape, columns), dtype=dtype)
