"""The largest or least of the sequence, and where it is.

Gradients are eager's: those of ``amax`` are shared evenly by all that are equal, on
whatever rank; those of ``max`` along a dim go to the first.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ringcompile.passes.collectors.base import (
    Collector,
    drop_dims,
    is_whole,
    sums_over,
    wide_dtype,
)
from ringcompile.passes.op import Op, is_float, shape_of
from ringcompile.passes.rules.selections import reduced_dims

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement, Shard

aten = torch.ops.aten


def find_extreme(
    emitter: "Emitter",
    x: Node,
    shard: "Shard",
    dims: Sequence[int],
    *,
    sign: int,
    rank: int,
) -> Node:
    """The largest (``sign`` -1: least) of all ranks, dims kept, no gradient."""
    reduce = aten.amax.default if sign > 0 else aten.amin.default
    x = emitter.call(aten.detach.default, x)
    x = emitter.fill_pads(x, shard, -sign * float("inf"), rank=rank)
    local = emitter.call(reduce, x, list(dims), True)
    return emitter.call(reduce, emitter.stack_ranks(local, shard), [shard.dim], True)


class _Extreme(Collector):
    """``amax``, ``amin``, and ``max`` and ``min`` of everything."""

    def __init__(self, sign: int) -> None:
        self._sign = sign

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        return (
            is_float(op.slots[0])
            and "other" not in op.args
            and sums_over(op, current[0])
        )

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        node, x = op.slots[0], operands[0]
        shard, rank = emitter.shard_of(node), op.rank(0)
        dims = sorted(reduced_dims(op))
        call, wide = emitter.call, wide_dtype(op.node)
        top = find_extreme(emitter, x, shard, dims, sign=self._sign, rank=rank)
        keepdim = op.args.get("keepdim")
        if emitter.needs_grad(node):
            is_finite = call(aten.isfinite.default, top)
            is_top = call(aten.eq.Tensor, x, top)
            is_top = call(aten.logical_and.default, is_top, is_finite)
            is_top = emitter.fill_pads(is_top, shard, False, rank=rank)
            zero = call(aten.sub.Tensor, x, call(aten.detach.default, x))
            zero = call(aten.where.ScalarOther, is_top, zero, 0)
            zero = call(aten.sum.dim_IntList, zero, dims, True, dtype=wide)
            count = call(aten.sum.dim_IntList, is_top, dims, True, dtype=wide)
            count = call(aten.clamp.default, emitter.reduce(count), 1)
            share = call(aten.div.Tensor, emitter.reduce(zero), count)
            top = emitter.cast(
                call(aten.add.Tensor, top, share), op.node.meta["val"].dtype
            )
        return drop_dims(emitter, top, dims, keepdim)


class _First(Collector):
    """``max``, ``min`` and where they are along the sequence: the first wins."""

    def __init__(self, sign: int) -> None:
        self._sign = sign

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard = current[0]
        return (
            shard is not None
            and is_float(op.slots[0])
            and isinstance(op.args.get("dim"), int)
            and shard.dim == op.args["dim"] % op.rank(0)
            and is_whole(shard)
        )

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        node, x = op.slots[0], operands[0]
        shard, rank = emitter.shard_of(node), op.rank(0)
        call, dim, keepdim = emitter.call, shard.dim, op.args["keepdim"]
        top = find_extreme(emitter, x, shard, [dim], sign=self._sign, rank=rank)
        # Where there is a NaN it is the extreme.
        is_top = call(
            aten.logical_or.default,
            call(aten.eq.Tensor, x, top),
            call(aten.isnan.default, x),
        )
        positions = emitter.positions_along(shard, rank)
        length = emitter.size(shape_of(node)[dim])
        is_top = emitter.fill_pads(is_top, shard, False, rank=rank)
        at = call(aten.where.ScalarOther, is_top, positions, length)
        at = call(aten.amin.default, at, [dim], True)
        index = call(aten.amin.default, emitter.stack_ranks(at, shard), [dim], True)
        found = drop_dims(emitter, index, [dim], keepdim)
        if op.packet in (aten.argmax, aten.argmin):
            return found
        is_first = call(aten.eq.Tensor, positions, index)
        value = call(aten.where.ScalarOther, is_first, x, 0)
        dtype = node.meta["val"].dtype
        value = call(aten.sum.dim_IntList, value, [dim], keepdim, dtype=dtype)
        return call(tuple, (emitter.reduce(value), found))


class _Quantifier(Collector):
    """``any`` and ``all``, by counting."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        return sums_over(op, current[0])

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        call, shard = emitter.call, emitter.shard_of(op.slots[0])
        is_any = op.packet is aten.any
        compare: Any = aten.ne.Scalar if is_any else aten.eq.Scalar
        counted = call(compare, operands[0], 0)
        counted = emitter.fill_pads(counted, shard, False, rank=op.rank(0))
        dims, keepdim = sorted(reduced_dims(op)), bool(op.args.get("keepdim"))
        count = call(aten.sum.dim_IntList, counted, dims, keepdim)
        decide = aten.gt.Scalar if is_any else aten.eq.Scalar
        return call(decide, emitter.reduce(count), 0)


COLLECTORS: dict[Any, tuple[Collector, ...]] = {
    aten.amax: (_Extreme(1),),
    aten.amin: (_Extreme(-1),),
    aten.max: (_First(1), _Extreme(1)),
    aten.min: (_First(-1), _Extreme(-1)),
    aten.argmax: (_First(1),),
    aten.argmin: (_First(-1),),
    aten.any: (_Quantifier(),),
    aten.all: (_Quantifier(),),
}
