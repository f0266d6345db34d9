"""Products that sum over the sequence: each rank's part, then their sum."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ringcompile.passes.collectors.base import Collector
from ringcompile.passes.op import Op, shape_of
from ringcompile.passes.rules.contractions import read_terms
from ringcompile.torch_private import sizes_equal

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement

aten = torch.ops.aten


class _Product(Collector):
    """Both operands are cut along the dim that is summed over."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        return any(self._is_summed(op, current, dims) for dims in _find_summed_dims(op))

    def _is_summed(
        self, op: Op, current: Sequence["Placement"], dims: dict[int, int]
    ) -> bool:
        """Whether one axis, cut alike, lies along these dims and nowhere else."""
        shards = [p for p in current if p is not None]
        first = shards[0]
        sizes = [shape_of(op.slots[slot])[d] for slot, d in dims.items()]
        return (
            all(sizes_equal(sizes[0], size) for size in sizes)
            and all(
                p is None or (slot in dims and p.dim == dims[slot])
                for slot, p in enumerate(current)
            )
            and all(
                (p.axis, p.outer, p.inner) == (first.axis, first.outer, first.inner)
                for p in shards
            )
        )

    def _summed(self, op: Op, current: Sequence["Placement"]) -> dict[int, int]:
        return next(d for d in _find_summed_dims(op) if self._is_summed(op, current, d))

    def operands(self, op: Op, current: Sequence["Placement"]) -> Sequence["Placement"]:
        first = next(p for p in current if p is not None)
        dims = self._summed(op, current)
        return [
            replace(first, dim=dims[slot]) if slot in dims else None
            for slot in range(len(current))
        ]

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        slot = next(s for s, node in enumerate(op.slots) if emitter.is_sharded(node))
        shard = emitter.shard_of(op.slots[slot])
        operands = list(operands)
        operands[slot] = emitter.mask_pads(operands[slot], shard, rank=op.rank(slot))
        added = op.slot("bias")
        args = op.with_slots(operands)
        if added is None:
            return emitter.reduce(emitter.call_op(op, args))
        bias = emitter.operand(op.slots[added], None, by_shards=False)
        total = emitter.reduce(emitter.call_op(op, args | {"bias": None}))
        return emitter.call(aten.add.Tensor, total, bias)


def _find_summed_dims(op: Op) -> list[dict[int, int]]:
    """For each index that is summed over: which dim of which slot it is."""
    ranks = [op.rank(slot) for slot in range(len(op.slots))]
    if op.packet is aten.einsum:
        terms = read_terms(op)
        if terms is None:
            return []
        *inputs, out = terms
        summed = sorted(set("".join(inputs)) - set(out))
        return [{s: t.index(i) for s, t in enumerate(inputs) if i in t} for i in summed]
    if op.packet is aten.tensordot:
        pairs = zip(op.args["dims_self"], op.args["dims_other"], strict=True)
        return [{0: a % ranks[0], 1: b % ranks[1]} for a, b in pairs]
    if op.packet is aten.linear:
        return [{0: ranks[0] - 1, 1: ranks[1] - 1}]
    right = 0 if ranks[1] == 1 else ranks[1] - 2
    return [{0: ranks[0] - 1, 1: right}]


COLLECTORS: dict[Any, tuple[Collector, ...]] = dict.fromkeys(
    (aten.matmul, aten.mm, aten.bmm, aten.einsum, aten.tensordot, aten.linear),
    (_Product(),),
)
