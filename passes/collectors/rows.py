"""Rows of the sequence by index, read from and written to where they lie."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ringcompile.passes.collectors.base import Collector, is_whole
from ringcompile.passes.op import Op, shape_of
from ringcompile.passes.rules.pieces import find_index_place
from ringcompile.torch_private import sizes_equal

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement, Shard

aten = torch.ops.aten


def _find_rows(emitter: "Emitter", indices: Node, shard: "Shard") -> tuple[Node, Node]:
    """The local row of each global index, and whether it is here; 0 if not."""
    call, rows = emitter.call, emitter.row_table(shard)
    length = emitter.axis_length(shard)
    last = call(aten.add.Tensor, indices, length)
    wrapped = call(aten.where.self, call(aten.lt.Scalar, indices, 0), last, indices)
    found = call(aten.index.Tensor, rows, [wrapped])
    is_here = call(aten.ge.Scalar, found, 0)
    return call(aten.clamp.default, found, 0), is_here


def _collect(emitter: "Emitter", x: Node, is_here: Node, op: Op) -> Node:
    """Every rank's rows, zero where they are another's, summed."""
    own = emitter.call(aten.where.ScalarOther, is_here, x, 0)
    assert op.node.meta["val"].dtype != torch.bool, "bools are not summed"
    return emitter.reduce(own)


def _can_be_read(op: Op, current: Sequence["Placement"]) -> bool:
    """The sequence alone in a dim of the first operand, all others replicated."""
    shard = current[0]
    return (
        shard is not None
        and is_whole(shard)
        and not any(current[1:])
        and op.node.meta["val"].dtype != torch.bool
    )


class _IndexSelect(Collector):
    """``index_select`` along the sequence."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard = current[0]
        return (
            _can_be_read(op, current)
            and shard is not None
            and shard.dim == op.args["dim"] % op.rank(0)
            and op.rank(1) == 1
        )

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        shard = emitter.shard_of(op.slots[0])
        rows, is_here = _find_rows(emitter, operands[1], shard)
        x = emitter.call(aten.index_select.default, operands[0], shard.dim, rows)
        shape = [1] * op.rank(0)
        shape[shard.dim] = -1
        is_here = emitter.call(aten.reshape.default, is_here, shape)
        return _collect(emitter, x, is_here, op)


class _Gather(Collector):
    """``gather`` along the sequence."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard = current[0]
        is_along = shard is not None and shard.dim == op.args["dim"] % op.rank(0)
        return is_along and _can_be_read(op, current)

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        shard = emitter.shard_of(op.slots[0])
        rows, is_here = _find_rows(emitter, operands[1], shard)
        x = emitter.call(aten.gather.default, operands[0], shard.dim, rows)
        return _collect(emitter, x, is_here, op)


class _Index(Collector):
    """``x[..., i, j]`` with one index along the sequence."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard, place = current[0], find_index_place(op)
        return (
            shard is not None
            and place is not None
            and shard.dim in place[1]
            and _can_be_read(op, current)
        )

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        shard, at = emitter.shard_of(op.slots[0]), find_index_place(op)
        assert at is not None, "accepted"
        place, indexed = at
        indices = [*op.with_slots(operands)["indices"]]
        own = op.args["indices"][shard.dim]
        assert isinstance(own, Node), "an index is a tensor"
        rows, is_here = _find_rows(emitter, indices[shard.dim], shard)
        indices[shard.dim] = rows
        x = emitter.call(aten.index.Tensor, operands[0], indices)
        count = len(shape_of(op.node)) - (op.rank(0) - len(indexed))
        behind = len(shape_of(op.node)) - place - count
        shape = [*(emitter.size(n) for n in shape_of(own)), *(1,) * behind]
        is_here = emitter.call(aten.reshape.default, is_here, shape)
        return _collect(emitter, x, is_here, op)


class _Write(Collector):
    """``select_scatter`` and ``slice_scatter``: each rank writes the rows it holds."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard = current[0]
        ends = [op.args.get(k) for k in ("index", "start", "end", "step")]
        return (
            shard is not None
            and is_whole(shard)
            and shard.dim == op.args["dim"] % op.rank(0)
            and not any(isinstance(end, Node) for end in ends)
        )

    def operands(self, op: Op, current: Sequence["Placement"]) -> Sequence["Placement"]:
        return (current[0], None)

    def placement(self, op: Op, current: Sequence["Placement"]) -> "Placement":
        return current[0]

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        call, shard = emitter.call, emitter.shard_of(op.slots[0])
        positions = emitter.positions_along(shard, op.rank(0))
        x, source = operands
        length = shape_of(op.slots[0])[shard.dim]
        if op.packet is aten.select_scatter:
            index = op.args["index"]
            index = emitter.size(length + index if index < 0 else index)
            source = call(aten.unsqueeze.default, source, shard.dim)
            return call(
                aten.where.self, call(aten.eq.Scalar, positions, index), source, x
            )
        first, step = _first_written(op, length), op.args["step"]
        count = shape_of(op.slots[1])[shard.dim]
        if sizes_equal(count, 0):
            return x
        row = call(aten.sub.Scalar, emitter.positions(shard), emitter.size(first))
        is_written = call(aten.ge.Scalar, row, 0)
        if step != 1:
            on_step = call(aten.eq.Scalar, call(aten.remainder.Scalar, row, step), 0)
            is_written = call(aten.logical_and.default, is_written, on_step)
            row = call(aten.div.Scalar_mode, row, step, rounding_mode="floor")
        is_before = call(aten.lt.Scalar, row, emitter.size(count))
        is_written = call(aten.logical_and.default, is_written, is_before)
        last = emitter.size(count - 1)
        row = call(aten.clamp.default, row, 0, last)
        source = call(aten.index_select.default, source, shard.dim, row)
        shape = [1] * op.rank(0)
        shape[shard.dim] = -1
        is_written = call(aten.reshape.default, is_written, shape)
        return call(aten.where.self, is_written, source, x)


def _first_written(op: Op, length: Any) -> Any:  # noqa: ANN401 - sizes
    start = op.args["start"]
    if start is None:
        return 0
    return max(0, length + start) if start < 0 else min(start, length)


COLLECTORS: dict[Any, tuple[Collector, ...]] = {
    aten.index_select: (_IndexSelect(),),
    aten.gather: (_Gather(),),
    aten.index: (_Index(),),
    aten.select_scatter: (_Write(),),
    aten.slice_scatter: (_Write(),),
}
