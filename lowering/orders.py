"""Positions of a shard's rows, and where each position lies, on every layout.

Those of runs are arithmetic. Invariant: those of a curve are tables that an op makes
when the graph runs, so that none is baked into the graph.
"""

from typing import cast

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.layout import Layout
from ringcompile.lowering.rows import Size
from ringcompile.lowering.selected import OrderSpec


def find_positions(
    layout: Layout,
    rank: int,
    chunk: Size,
    *,
    length: Size | None,
    device: torch.device,
) -> Tensor:
    """Global positions of a rank's rows, ``(T,)`` int64; those of pads are past S.

    Args:
        layout: which positions each rank holds.
        rank: whose rows.
        chunk: tokens in a chunk.
        length: tokens S; None where any will do.
        device: where they are made.
    """
    if layout.has_runs:
        # An int, or symbolic.
        return layout.position_tensor(rank, cast("int", chunk), device)
    assert length is not None, "a curve goes through a known number of tokens"
    text = str(OrderSpec(layout, int(length), rank))
    table: Tensor = ops.ROW_TABLE(text, device=device)
    return table[0]


def find_rows(layout: Layout, length: int, device: torch.device) -> Tensor:
    """Where, among all shards laid end to end, each position lies: ``(S,)`` int64."""
    text = str(OrderSpec(layout, length, rank=None))
    table: Tensor = ops.ROW_TABLE(text, device=device)
    return table[0]
