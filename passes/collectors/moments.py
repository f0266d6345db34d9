"""Statistics over the sequence: softmax, variance, norms, and what they normalise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ringcompile.passes.collectors.base import (
    Collector,
    drop_dims,
    sums_over,
    wide_dtype,
)
from ringcompile.passes.collectors.extremes import find_extreme
from ringcompile.passes.dims import Size
from ringcompile.passes.op import Op, is_float, shape_of
from ringcompile.passes.rules.selections import reduced_dims

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement, Shard

aten = torch.ops.aten


def count_elements(node: Node, dims: Sequence[int]) -> Size:
    """How many elements of the whole value its dims hold."""
    count: Size = 1
    for d in dims:
        count = count * shape_of(node)[d]
    return count


def sum_all(
    emitter: "Emitter", x: Node, shard: "Shard", dims: Sequence[int], *, rank: int
) -> Node:
    """The sum over all ranks, pads left out, dims kept."""
    x = emitter.mask_pads(x, shard, rank=rank)
    return emitter.reduce(emitter.call(aten.sum.dim_IntList, x, list(dims), True))


def safe_root(emitter: "Emitter", x: Node) -> Node:
    """The square root; its gradient at 0 is 0, as that of ``std`` and norms is."""
    call = emitter.call
    is_zero = call(aten.eq.Scalar, x, 0)
    root = call(aten.sqrt.default, call(aten.masked_fill.Scalar, x, is_zero, 1))
    return call(aten.masked_fill.Scalar, root, is_zero, 0)


def find_moments(
    emitter: "Emitter", x: Node, op: Op, dims: Sequence[int]
) -> tuple[Node, Node]:
    """Mean and summed squared distance from it, dims kept."""
    call, shard, rank = emitter.call, emitter.shard_of(op.slots[0]), op.rank(0)
    count = emitter.size(count_elements(op.slots[0], dims))
    total = sum_all(emitter, x, shard, dims, rank=rank)
    mean = call(aten.div.Tensor, total, count)
    # The gradient through this mean is that of a sum of distances, which is 0.
    away = call(aten.sub.Tensor, x, call(aten.detach.default, mean))
    squares = call(aten.mul.Tensor, away, away)
    return mean, sum_all(emitter, squares, shard, dims, rank=rank)


class _Variance(Collector):
    """``var``, ``std`` and both with the mean."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        return is_float(op.slots[0]) and sums_over(op, current[0])

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        call, node = emitter.call, op.slots[0]
        dims, keepdim = sorted(reduced_dims(op)), op.args.get("keepdim")
        x = emitter.cast(operands[0], wide_dtype(node))
        mean, squares = find_moments(emitter, x, op, dims)
        freedom = call(
            aten.sub.Tensor, self._count(emitter, node, dims), _correction(op)
        )
        value = call(aten.div.Tensor, squares, call(aten.clamp.default, freedom, 0))
        if op.packet in (aten.std, aten.std_mean):
            value = safe_root(emitter, value)
        dtype = node.meta["val"].dtype
        results = [
            emitter.cast(drop_dims(emitter, v, dims, keepdim), dtype)
            for v in (value, mean)
        ]
        has_mean = op.packet in (aten.var_mean, aten.std_mean)
        return call(tuple, tuple(results)) if has_mean else results[0]

    def _count(self, emitter: "Emitter", node: Node, dims: Sequence[int]) -> Node:
        size = emitter.size(count_elements(node, dims))
        options = {"dtype": wide_dtype(node), "device": node.meta["val"].device}
        return emitter.call(aten.full.default, [], size, **options)


def _correction(op: Op) -> float:
    if "unbiased" in op.args:
        return float(op.args["unbiased"])
    given = op.args["correction"]
    return 1.0 if given is None else float(given)


class _Norm(Collector):
    """The 1- and 2-norm."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        is_known = op.args["ord"] in (1, 2) and op.args["dtype"] is None
        return is_known and is_float(op.slots[0]) and sums_over(op, current[0])

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        call, node = emitter.call, op.slots[0]
        dims = sorted(reduced_dims(op))
        x = emitter.cast(operands[0], wide_dtype(node))
        is_square = op.args["ord"] == 2  # noqa: PLR2004 - Euclid's
        x = call(aten.mul.Tensor, x, x) if is_square else call(aten.abs.default, x)
        shard = emitter.shard_of(node)
        total = sum_all(emitter, x, shard, dims, rank=op.rank(0))
        total = safe_root(emitter, total) if is_square else total
        result = drop_dims(emitter, total, dims, op.args["keepdim"])
        return emitter.cast(result, node.meta["val"].dtype)


class _LogSumExp(Collector):
    """``logsumexp`` over dims of which one is the sequence."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        return is_float(op.slots[0]) and sums_over(op, current[0])

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        call, dims = emitter.call, sorted(reduced_dims(op))
        x = emitter.cast(operands[0], wide_dtype(op.slots[0]))
        top, total = sum_exponentials(emitter, x, op, dims)
        result = call(aten.add.Tensor, call(aten.log.default, total), top)
        result = drop_dims(emitter, result, dims, op.args["keepdim"])
        return emitter.cast(result, op.node.meta["val"].dtype)


def sum_exponentials(
    emitter: "Emitter", x: Node, op: Op, dims: Sequence[int]
) -> tuple[Node, Node]:
    """A finite number near the largest, and the sum of ``exp(x - it)``, dims kept."""
    call, shard, rank = emitter.call, emitter.shard_of(op.slots[0]), op.rank(0)
    top = find_extreme(emitter, x, shard, dims, sign=1, rank=rank)
    is_infinite = call(aten.isinf.default, top)
    top = call(aten.masked_fill.Scalar, top, is_infinite, 0)
    powers = call(aten.exp.default, call(aten.sub.Tensor, x, top))
    return top, sum_all(emitter, powers, shard, dims, rank=rank)


class _Softmax(Collector):
    """``softmax`` and ``log_softmax`` along the sequence; the result stays sharded."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        shard = current[0]
        return (
            shard is not None
            and is_float(op.slots[0])
            and isinstance(op.args["dim"], int)
            and shard.dim == op.args["dim"] % op.rank(0)
        )

    def placement(self, op: Op, current: Sequence["Placement"]) -> "Placement":
        return current[0]

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        call, node = emitter.call, op.slots[0]
        dtype = op.node.meta["val"].dtype
        x = emitter.cast(operands[0], wide_dtype(op.node))
        dims = [op.args["dim"] % op.rank(0)]
        top, total = sum_exponentials(emitter, x, op, dims)
        if emitter.needs_grad(node):
            total = emitter.spread([total])[0]
        x = call(aten.sub.Tensor, x, top)
        if op.packet in (aten.softmax, aten._softmax):  # noqa: SLF001
            return emitter.cast(
                call(aten.div.Tensor, call(aten.exp.default, x), total), dtype
            )
        return emitter.cast(
            call(aten.sub.Tensor, x, call(aten.log.default, total)), dtype
        )


COLLECTORS: dict[Any, tuple[Collector, ...]] = {
    aten.var: (_Variance(),),
    aten.std: (_Variance(),),
    aten.var_mean: (_Variance(),),
    aten.std_mean: (_Variance(),),
    aten.linalg_vector_norm: (_Norm(),),
    aten.logsumexp: (_LogSumExp(),),
    aten.softmax: (_Softmax(),),
    aten._softmax: (_Softmax(),),  # noqa: SLF001
    aten.log_softmax: (_Softmax(),),
    aten._log_softmax: (_Softmax(),),  # noqa: SLF001
}
