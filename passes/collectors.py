"""Ops that turn a sharded value into a replicated one by summing over the ranks.

Sums and means over the sequence, one selected position, and losses. Each is computed on
the shard, pads left out, and then reduced: ``Partial`` never outlives its op.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ringcompile.passes.op import Op, is_float, shape_of
from ringcompile.passes.rules.selections import reduced_dims

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement, Shard

aten = torch.ops.aten


class Collector(ABC):
    """How one class of ops is summed over the ranks."""

    @abstractmethod
    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        """Whether it can carry this call out."""

    def operands(self, op: Op, current: Sequence["Placement"]) -> Sequence["Placement"]:
        """What each operand must be."""
        return current

    @abstractmethod
    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        """Write the local computation and its reduction; return the result."""


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
        wide = torch.promote_types(dtype, torch.float32) if is_float(op.node) else dtype
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
            and _is_whole(shard)
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


class _CrossEntropy(Collector):
    """Cross entropy over class indices, averaged by the global count."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        logits, target = op.slots[:2]
        shard = current[0]
        return (
            shard is not None
            and shard.dim == 0
            and len(shape_of(logits)) == _MATRIX
            and current[1] is None
            and not is_float(target)
            and op.args["reduction"] in (_MEAN, _SUM)
        )

    def operands(self, op: Op, current: Sequence["Placement"]) -> Sequence["Placement"]:
        rest = (None,) * (len(current) - 2)
        return (current[0], current[0], *rest)

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        shard = emitter.shard_of(op.slots[0])
        target = emitter.env[op.slots[1]]
        ignored = op.args["ignore_index"]
        operands[1] = emitter.cut(target, shard, fill=ignored)
        args = op.with_slots(operands) | {"reduction": _SUM}
        total = emitter.reduce(emitter.call_op(op, args))
        if op.args["reduction"] == _SUM:
            return total
        return emitter.call(aten.div.Tensor, total, self._count(emitter, op, target))

    def _count(self, emitter: "Emitter", op: Op, target: Node) -> Node:
        """What the sum is divided by: targets that count, by their class weights."""
        call = emitter.call
        counted = call(aten.ne.Scalar, target, op.args["ignore_index"])
        if op.args["weight"] is None:
            return call(aten.sum.default, counted)
        weight = emitter.env[op.args["weight"]]
        safe = call(aten.where.ScalarOther, counted, target, 0)
        weights = call(aten.index.Tensor, weight, [safe])
        return call(aten.sum.default, call(aten.mul.Tensor, weights, counted))


_MEAN, _SUM = 1, 2
_MATRIX = 2


def _is_whole(shard: "Shard") -> bool:
    return bool(shard.outer == 1 and shard.inner == 1)


_COLLECTORS: dict[Any, Collector] = {
    aten.sum: _Sum(),
    aten.mean: _Sum(),
    aten.select: _Select(),
    aten.cross_entropy_loss: _CrossEntropy(),
}


def find_collector(op: Op, current: Sequence["Placement"]) -> Collector | None:
    """The collector that can carry out ``op`` on these placements, if any."""
    collector = _COLLECTORS.get(op.packet)
    if collector is None or not collector.accepts(op, current):
        return None
    return collector
