"""Losses that are summed over the tokens, each token's on the rank that holds it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ringcompile.passes.collectors.base import Collector, wide_dtype
from ringcompile.passes.dims import Size
from ringcompile.passes.op import Op, is_float, shape_of
from ringcompile.passes.rules.losses import BY_CLASS, ELEMENTWISE, MEAN, NONE, SUM
from ringcompile.torch_private import sizes_equal

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement, Shard

aten = torch.ops.aten


class _ClassLoss(Collector):
    """Cross entropy or likelihood of class indices, averaged by the global count."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard = current[0]
        return (
            shard is not None
            and shard.dim != _CLASSES
            and op.rank(0) > 1
            and current[1] is None
            and not is_float(op.slots[1])
            and op.args["reduction"] in (MEAN, SUM)
        )

    def operands(self, op: Op, current: Sequence["Placement"]) -> Sequence["Placement"]:
        shard = current[0]
        assert shard is not None, "the scores are sharded"
        rest = (None,) * (len(current) - 2)
        return (shard, _without_classes(shard), *rest)

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        shard = emitter.shard_of(op.slots[0])
        target = emitter.env[op.slots[1]]
        ignored = op.args["ignore_index"]
        operands[1] = emitter.cut(
            target, _without_classes(shard), rank=op.rank(1), fill=ignored
        )
        args = op.with_slots(operands) | {"reduction": SUM}
        total = emitter.reduce(emitter.call_op(op, args))
        if op.args["reduction"] == SUM:
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


class _SoftLoss(Collector):
    """Cross entropy with a probability for each class, averaged over the tokens."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shards = [p for p in current[:2] if p is not None]
        return (
            op.rank(0) > 1
            and is_float(op.slots[1])
            and op.args["reduction"] in (MEAN, SUM)
            and bool(shards)
            and all(p == shards[0] and p.dim != _CLASSES for p in shards)
        )

    def operands(self, op: Op, current: Sequence["Placement"]) -> Sequence["Placement"]:
        shard = next(p for p in current if p is not None)
        return (shard, shard, *(None,) * (len(current) - 2))

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        slot = next(s for s in op.slots if emitter.is_sharded(s))
        shard = _without_classes(emitter.shard_of(slot))
        sizes = [n for d, n in enumerate(shape_of(op.slots[0])) if d != _CLASSES]
        return _sum_losses(emitter, op, operands, shard, sizes)


class _ElementLoss(Collector):
    """A loss of each element, summed or averaged over all of them."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        rank = _rank(op)
        shards = {_aligned(p, op.rank(s), rank) for s, p in enumerate(current) if p}
        if op.args["reduction"] == NONE or len(shards) != 1:
            return False
        at, sizes = next(iter(shards)).dim, _sizes(op)
        spans = [self._spans(op, slot, at) for slot in range(len(current))]
        return all(
            spans[slot] in (None, 1) or sizes_equal(spans[slot], sizes[at])  # type: ignore[arg-type]
            for slot in range(len(current))
        )

    def _spans(self, op: Op, slot: int, at: int) -> Size | None:
        """An operand's size along the result's dim ``at``; None if it lacks it."""
        dim = at - _rank(op) + op.rank(slot)
        return shape_of(op.slots[slot])[dim] if dim >= 0 else None

    def operands(self, op: Op, current: Sequence["Placement"]) -> Sequence["Placement"]:
        slot, shard = next((s, p) for s, p in enumerate(current) if p is not None)
        whole = _aligned(shard, op.rank(slot), _rank(op))
        return [
            None
            if self._spans(op, s, whole.dim) in (None, 1)
            else _aligned(whole, _rank(op), op.rank(s))
            for s in range(len(current))
        ]

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        slot = next(s for s, n in enumerate(op.slots) if emitter.is_sharded(n))
        shard = _aligned(emitter.shard_of(op.slots[slot]), op.rank(slot), _rank(op))
        return _sum_losses(emitter, op, operands, shard, _sizes(op))


def _sum_losses(
    emitter: "Emitter",
    op: Op,
    operands: list[Node],
    shard: "Shard",
    sizes: Sequence[Size],
) -> Node:
    """Each element's loss, then their sum or mean over all ranks."""
    call, wide = emitter.call, wide_dtype(op.node)
    losses = emitter.call_op(op, op.with_slots(operands) | {"reduction": NONE})
    losses = emitter.mask_pads(losses, shard, rank=len(sizes))
    total = emitter.reduce(call(aten.sum.default, losses, dtype=wide))
    if op.args["reduction"] == MEAN:
        count: Size = 1
        for size in sizes:
            count = count * size
        total = call(aten.div.Tensor, total, emitter.size(count))
    return emitter.cast(total, op.node.meta["val"].dtype)


def _rank(op: Op) -> int:
    return max(op.rank(slot) for slot in range(len(op.slots)))


def _sizes(op: Op) -> Sequence[Size]:
    shapes = [shape_of(node) for node in op.slots]
    sizes: Sequence[Size] = torch.broadcast_shapes(*shapes)
    return sizes


def _aligned(shard: "Shard", rank: int, to: int) -> "Shard":
    """The same cut of a tensor of another rank; dims are aligned at the last."""
    return replace(shard, dim=shard.dim - rank + to)


def _without_classes(shard: "Shard") -> "Shard":
    """The cut of a value that lacks the dim of classes."""
    return replace(shard, dim=shard.dim - (shard.dim > _CLASSES))


_CLASSES = 1
"""The dim of classes in scores of more than one token."""

COLLECTORS: dict[Any, tuple[Collector, ...]] = {
    **dict.fromkeys(BY_CLASS, (_ClassLoss(),)),
    **dict.fromkeys(ELEMENTWISE, (_ElementLoss(),)),
    aten.cross_entropy_loss: (_ClassLoss(), _SoftLoss()),
}
