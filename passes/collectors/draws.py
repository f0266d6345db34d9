"""Random ops on shards: independent from row to row, the same on any number of ranks.

What dropout keeps is a hash of a seed, drawn once per run, and of an element's global
indices; the seed is saved for backward. So ranks, layouts and replays agree.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ringcompile.ops import FIND_KEPT
from ringcompile.passes.collectors.base import Collector
from ringcompile.passes.op import Op, is_float, shape_of

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement

aten = torch.ops.aten

_CHANNEL_DIMS = 2
_ALPHA = 1.7580993408473766  # -lambda * alpha of SELU: where dropped elements go


class _Dropout(Collector):
    """``dropout``, of whole channels too: each rank drops from what it holds."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        return current[0] is not None and is_float(op.slots[0])

    def placement(self, op: Op, current: Sequence["Placement"]) -> "Placement":
        return current[0]

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        call, rate = emitter.call, float(op.args["p"])
        kept = self._find_kept(emitter, op, rate)
        if op.packet is aten.alpha_dropout:
            return self._squash(emitter, operands[0], kept, rate)
        scale = 0.0 if rate == 1 else 1 / (1 - rate)
        scaled = call(aten.mul.Scalar, operands[0], scale)
        return call(aten.where.ScalarOther, kept, scaled, 0)

    def _find_kept(self, emitter: "Emitter", op: Op, rate: float) -> Node:
        shard, rank = emitter.shard_of(op.slots[0]), op.rank(0)
        of_channels = op.packet is aten.feature_dropout
        dims = range(min(rank, _CHANNEL_DIMS) if of_channels else rank)
        at = [emitter.indices(op.slots[0], d, shard) for d in dims]
        return emitter.call(FIND_KEPT, emitter.draw_seed(), at, rate)

    def _squash(self, emitter: "Emitter", x: Node, kept: Node, rate: float) -> Node:
        """Keep mean and variance, as SELU networks want it."""
        if rate == 1:
            return emitter.call(aten.mul.Scalar, x, 0.0)
        a = 1 / math.sqrt((_ALPHA**2 * rate + 1) * (1 - rate))
        dropped = _ALPHA * a * (rate - 1)
        scaled = emitter.call(aten.mul.Scalar, x, a)
        scaled = emitter.call(aten.add.Scalar, scaled, _ALPHA * a * rate)
        return emitter.call(aten.where.ScalarOther, kept, scaled, dropped)


class _Noise(Collector):
    """Noise of a tensor's shape, drawn whole: eager's numbers, and nothing gathered."""

    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        return current[0] is not None

    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        value = op.node.meta["val"]
        sizes = [emitter.size(n) for n in shape_of(op.node)]
        options = {"dtype": value.dtype, "device": value.device}
        draw = aten.rand if op.packet is aten.rand_like else aten.randn
        return emitter.call(draw.default, sizes, **options)


COLLECTORS: dict[Any, tuple[Collector, ...]] = {
    aten.dropout: (_Dropout(),),
    aten.feature_dropout: (_Dropout(),),
    aten.alpha_dropout: (_Dropout(),),
    aten.rand_like: (_Noise(),),
    aten.randn_like: (_Noise(),),
}
