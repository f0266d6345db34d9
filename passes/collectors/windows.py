"""Slices that keep most of the sequence: rows stay where they are, some don't count.

``x[:, :-1]`` is a sequence of its own. It lies on the rows that ``x`` lies on, and
those outside it are pads. Their values stay, so that nothing made of them is NaN, and
no gradient comes back through them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ringcompile.passes.collectors.base import Collector
from ringcompile.passes.op import Op, shape_of
from ringcompile.torch_private import size_hint

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement

aten = torch.ops.aten


class WindowSlice(Collector):
    """A slice whose result lies on an axis of its own."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        """Whether the slice is of neighbours, and long enough to be worth its pads."""
        shard = current[0]
        if shard is None or shard.dim != op.args["dim"] % op.rank(0):
            return False
        if shard.outer != 1 or shard.inner != 1 or op.args.get("step", 1) != 1:
            return False
        sizes = [size_hint(shape_of(n)[shard.dim]) for n in (op.slots[0], op.node)]
        return find_start(op) is not None and 2 * sizes[1] >= sizes[0]

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        """The same rows; those outside the slice give no gradient."""
        return emitter.keep_rows(operands[0], emitter.shard_of(op.node), op.rank(0))


def find_start(op: Op) -> int | None:
    """The first position of a slice; None where it is known only at run time."""
    start = op.args["start"] if op.args["start"] is not None else 0
    if not isinstance(start, int):
        return None
    size = shape_of(op.slots[0])[op.args["dim"] % op.rank(0)]
    if start < 0:
        return max(0, size + start) if isinstance(size, int) else None
    return start


WINDOW = WindowSlice()
SLICES = (aten.slice, aten.narrow)
