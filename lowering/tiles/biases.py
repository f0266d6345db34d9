"""Blocks of biases: what is added to a block of scores, and its gradient summed up.

Invariant: sums are taken in one order, whatever the device, so that two runs give the
same bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileBias:
    """A bias as one tile's kernel reads it.

    Attributes:
        tensor: ``(B or 1, H or 1, n or 1, columns)``.
        is_relative: whether column ``k - q + S - 1`` of ``2 S - 1`` is meant; else
            column k of S, or the one there is.
        q_pos: ``(H or 1, n)`` global positions, -1 for no row; pads are past S.
        k_pos: ``(H or 1, m)``, likewise.
    """

    tensor: Tensor
    is_relative: bool
    q_pos: Tensor
    k_pos: Tensor

    @property
    def has_column_per_key(self) -> bool:
        """Whether a column is one key's."""
        return not self.is_relative and self.tensor.shape[3] != 1

    def block(self, i: slice, j: slice, dtype: torch.dtype) -> Tensor:
        """What is added to scores of a block; broadcasts to ``(B, H, i, j)``."""
        rows = self.tensor if self.tensor.shape[2] == 1 else self.tensor[:, :, i]
        if not self.is_relative and not self.has_column_per_key:
            return rows.to(dtype)
        index = self._columns(i, j)
        sizes = (max(a, b) for a, b in zip(rows.shape[1:3], index.shape, strict=False))
        shape = (rows.shape[0], *sizes)
        index = index.expand(*shape, -1)
        return rows.expand(*shape, -1).gather(3, index).to(dtype)

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """Where ``add_gradient`` sums up, of a tile with all its keys."""
        shape = self.tensor.shape
        if self.has_column_per_key:
            shape = torch.Size((*shape[:3], self.k_pos.shape[1]))
        return self.tensor.new_zeros(shape, dtype=dtype)

    def add_gradient(self, total: Tensor, d_scores: Tensor, i: slice, j: slice) -> None:
        """Add a block's, summed over what the bias is broadcast over.

        Args:
            total: as ``zeros`` gives it; written.
            d_scores: ``(B, H, i, j)``.
            i: the block's queries.
            j: the block's keys.
        """
        shared = [dim for dim in (0, 1) if total.shape[dim] == 1]
        if shared:
            d_scores = d_scores.sum(shared, keepdim=True)
        rows = slice(None) if total.shape[2] == 1 else i
        if self.is_relative:
            total[:, :, rows] += self._sum_by_column(d_scores, i, j, total.shape)
            return
        if total.shape[2] == 1:
            d_scores = d_scores.sum(2, keepdim=True)
        if self.has_column_per_key:
            total[:, :, rows, j] += d_scores
        else:
            total[:, :, rows] += d_scores.sum(3, keepdim=True)

    def _columns(self, i: slice, j: slice) -> Tensor:
        """The column of each pair, ``(H or 1, i or 1, j)``; of no row, some other."""
        last = self.tensor.shape[3] - 1
        columns = self.k_pos[:, None, j]
        if self.is_relative:
            columns = columns - self.q_pos[:, i, None] + last // 2
        return columns.clamp(0, last)

    def _sum_by_column(
        self, d_scores: Tensor, i: slice, j: slice, shape: torch.Size
    ) -> Tensor:
        """Gradients of pairs by the column they read, ``(B', H', i or 1, columns)``."""
        B, H, n, _ = d_scores.shape
        index = self._columns(i, j)
        if shape[2] == 1:  # pairs of all rows together
            index, d_scores, n = index.flatten(1)[:, None], d_scores.flatten(2), 1
            d_scores = d_scores[:, :, None]
        total = d_scores.new_zeros(B, H, n, shape[3])
        if not d_scores.is_cuda:
            return total.scatter_add_(3, index.expand(B, H, -1, -1), d_scores)
        # There `scatter_add_` adds in any order, while this sorts first. On CPU it is
        # the other way round.
        at = [torch.arange(x, device=index.device) for x in (B, H, n)]
        b, h, row = (x.view(-1, *[1] * (3 - dim)) for dim, x in enumerate(at))
        return total.index_put_((b, h, row, index[None]), d_scores, accumulate=True)
