"""Whether an attention's heads can be dealt out to ranks (Ulysses).

Invariant: what differs from head to head stays with a ring over all ranks.
"""

from collections.abc import Sequence

from ringcompile.ir.mask import EmptyRow, H
from ringcompile.ir.schedule import PartSpec
from ringcompile.passes.regions import Region


def refuse_heads(region: Region, parts: Sequence[PartSpec], size: int) -> str | None:
    """Why ranks can't deal out the heads of an attention among themselves.

    Args:
        region: the attention.
        parts: its masks and selections, those of its pattern included.
        size: how many ranks.

    Returns:
        The reason; None if they can.
    """
    heads, kv_heads = (int(x.shape[1]) for x in (region.q, region.k))
    if heads % size or kv_heads % size:
        return f"{heads} query and {kv_heads} KV heads don't divide by {size}"
    if region.sinks is not None or region.biases or region.dropout:
        return "sinks, biases and dropout are heads' own"
    for mask, selection in parts:
        if selection is not None or mask.choice is not None:
            return "rows or blocks are selected by head"
        if H in mask.keeps.free_symbols:
            return "heads have masks of their own"
        if mask.empty_row not in {EmptyRow.ZERO, EmptyRow.NAN}:
            return "a row without a key takes the mean of all values"
    return None
