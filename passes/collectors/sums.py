"""Sums and means over the sequence, and one selected position."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ringcompile.passes.collectors.base import Collector, is_whole, wide_dtype
from ringcompile.passes.op import Op, shape_of
from ringcompile.passes.rules.selections import reduced_dims

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement

aten = torch.ops.aten


class _Sum(Collector):
    """``sum`` and ``mean`` over dims of which one is the sequence."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard = current[0]
        return shard is not None and shard.dim in reduced_dims(op)

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        shard = emitter.shard_of(op.slots[0])
        dims = sorted(reduced_dims(op))
        dtype = op.node.meta["val"].dtype
        x = emitter.mask_pads(operands[0], shard, rank=op.rank(0))
        wide = wide_dtype(op.node)
        keepdim = bool(op.args.get("keepdim"))
        local = emitter.call(aten.sum.dim_IntList, x, dims, keepdim, dtype=wide)
        total = emitter.reduce(local)
        if op.packet is aten.mean:
            sizes = shape_of(op.slots[0])
            count: Any = 1
            for d in dims:
                count = count * sizes[d]
            total = emitter.call(aten.div.Tensor, total, emitter.size(count))
        return emitter.cast(total, dtype)


class _Select(Collector):
    """One position of the sequence: its owner's row, all others count zero."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard = current[0]
        return (
            shard is not None
            and shard.dim == op.args["dim"] % op.rank(0)
            and is_whole(shard)
            and isinstance(op.args["index"], int)
        )

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        shard = emitter.shard_of(op.slots[0])
        index = op.args["index"]
        if index < 0:
            index = emitter.size(shape_of(op.slots[0])[shard.dim] + index)
        position = emitter.positions(shard)
        hit = emitter.call(aten.eq.Scalar, position, index)
        x = emitter.where_rows(hit, operands[0], shard, rank=op.rank(0))
        dtype = op.node.meta["val"].dtype
        local = emitter.call(aten.sum.dim_IntList, x, [shard.dim], dtype=dtype)
        return emitter.reduce(local)


COLLECTORS: dict[Any, tuple[Collector, ...]] = {
    aten.sum: (_Sum(),),
    aten.mean: (_Sum(),),
    aten.select: (_Select(),),
}
