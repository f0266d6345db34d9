"""Norms whose statistics run over the sequence; the result stays sharded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ringcompile.passes.collectors.base import Collector, wide_dtype
from ringcompile.passes.collectors.moments import count_elements, find_moments
from ringcompile.passes.op import Op, is_float, shape_of

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement

aten = torch.ops.aten

_CHANNELS = 1


class _BatchNorm(Collector):
    """Statistics of each channel over batch and sequence; running ones are written."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard = current[0]
        return (
            shard is not None
            and bool(op.args["training"])
            and shard.dim != _CHANNELS
            and not any(current[1:])
            and is_float(op.slots[0])
        )

    def placement(self, op: Op, current: Sequence["Placement"]) -> "Placement":
        return current[0]

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        dims = [d for d in range(op.rank(0)) if d != _CHANNELS]
        x = emitter.cast(operands[0], wide_dtype(op.node))
        mean, squares = find_moments(emitter, x, op, dims)
        count = emitter.size(count_elements(op.slots[0], dims))
        variance = emitter.call(aten.div.Tensor, squares, count)
        self._update(emitter, op, mean, squares)
        out = _standardize(emitter, x, mean, variance, op)
        return _scale(emitter, out, op, operands, [-1, *(1 for _ in dims[1:])])

    def _update(self, emitter: "Emitter", op: Op, mean: Node, squares: Node) -> None:
        """Move the running statistics, as ``nn.BatchNorm1d`` does in training."""
        call, share = emitter.call, op.args["momentum"]
        dims = [d for d in range(op.rank(0)) if d != _CHANNELS]
        freedom = emitter.size(count_elements(op.slots[0], dims) - 1)
        now = {
            "running_mean": mean,
            "running_var": call(aten.div.Tensor, squares, freedom),
        }
        for name, value in now.items():
            node = op.args[name]
            if node is None:
                continue
            running = emitter.env[node]
            flat = call(aten.detach.default, call(aten.reshape.default, value, [-1]))
            flat = emitter.cast(flat, node.meta["val"].dtype)
            moved = call(aten.mul.Scalar, running, 1 - share)
            moved = call(aten.add.Tensor, moved, call(aten.mul.Scalar, flat, share))
            call(aten.copy_.default, running, moved)


class _GroupNorm(Collector):
    """Group and instance norm: channels of a group over the whole sequence."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard = current[0]
        is_plain = op.packet is aten.group_norm or (
            op.args["use_input_stats"] and op.args["running_mean"] is None
        )
        return (
            is_plain
            and shard is not None
            and shard.dim > _CHANNELS
            and not any(current[1:])
            and is_float(op.slots[0])
        )

    def placement(self, op: Op, current: Sequence["Placement"]) -> "Placement":
        return current[0]

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        call = emitter.call
        x = emitter.cast(operands[0], wide_dtype(op.node))
        dims = list(range(2, op.rank(0)))
        mean, squares = find_moments(emitter, x, op, dims)
        count = emitter.size(count_elements(op.slots[0], dims))
        variance = call(aten.div.Tensor, squares, count)
        if op.packet is aten.group_norm:
            whole = _average_groups(emitter, mean, op)
            away = call(aten.sub.Tensor, mean, whole)
            variance = call(
                aten.add.Tensor, variance, call(aten.mul.Tensor, away, away)
            )
            mean, variance = whole, _average_groups(emitter, variance, op)
        out = _standardize(emitter, x, mean, variance, op)
        return _scale(emitter, out, op, operands, [-1, *(1 for _ in dims)])


def _average_groups(emitter: "Emitter", x: Node, op: Op) -> Node:
    """Something of each channel ``(N, C, 1, ...)``, averaged over its group."""
    call, groups = emitter.call, op.args["num_groups"]
    size = shape_of(op.slots[0])[_CHANNELS] // groups
    grouped = call(aten.unflatten.int, x, _CHANNELS, [groups, size])
    joined = call(aten.mean.dim, grouped, [2], True)
    rest = (-1 for _ in range(op.rank(0) - 2))
    expanded = call(aten.expand.default, joined, [-1, -1, size, *rest])
    return call(aten.flatten.using_ints, expanded, 1, 2)


def _standardize(
    emitter: "Emitter", x: Node, mean: Node, variance: Node, op: Op
) -> Node:
    """``x`` without mean and variance, which every rank has."""
    call = emitter.call
    if emitter.needs_grad(op.slots[0]):
        mean, variance = emitter.spread([mean, variance])
    scale = call(aten.rsqrt.default, call(aten.add.Scalar, variance, op.args["eps"]))
    return call(aten.mul.Tensor, call(aten.sub.Tensor, x, mean), scale)


def _scale(
    emitter: "Emitter", x: Node, op: Op, operands: list[Node], shape: Sequence[int]
) -> Node:
    """Weight and bias of each channel, and the result's dtype."""
    for name, apply in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        slot = op.slot(name)
        if slot is not None:
            by_channel = emitter.call(aten.reshape.default, operands[slot], list(shape))
            x = emitter.call(apply, x, by_channel)
    return emitter.cast(x, op.node.meta["val"].dtype)


COLLECTORS: dict[Any, tuple[Collector, ...]] = {
    aten.batch_norm: (_BatchNorm(),),
    aten.group_norm: (_GroupNorm(),),
    aten.instance_norm: (_GroupNorm(),),
}
