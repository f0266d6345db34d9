"""What all collectors share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ringcompile.passes.op import Op, is_float
from ringcompile.passes.rules.selections import reduced_dims

if TYPE_CHECKING:
    from ringcompile.passes.emitter import Emitter
    from ringcompile.passes.propagate_layout import Placement, Shard

aten = torch.ops.aten


class Collector(ABC):
    """How one class of ops is carried out on shards with the help of other ranks."""

    @abstractmethod
    def accepts(self, op: Op, current: Sequence["Placement"]) -> bool:
        """Whether it can carry this call out."""

    def operands(self, op: Op, current: Sequence["Placement"]) -> Sequence["Placement"]:
        """What each operand must be."""
        return current

    def placement(self, op: Op, current: Sequence["Placement"]) -> "Placement":
        """Where the result lies."""
        return None

    @abstractmethod
    def emit(self, emitter: "Emitter", op: Op, operands: list[Node]) -> Node:
        """Write the local computation and its reduction; return the result."""


def is_whole(shard: "Shard") -> bool:
    """Whether the sequence is alone in its dim."""
    return bool(shard.outer == 1 and shard.inner == 1)


def sums_over(op: Op, shard: "Placement") -> bool:
    """Whether a reduction's dims hold the sequence."""
    return shard is not None and shard.dim in reduced_dims(op)


def wide_dtype(node: Node) -> torch.dtype:
    """What a value is summed in: float32 or wider; integers as they are."""
    dtype: torch.dtype = node.meta["val"].dtype
    return torch.promote_types(dtype, torch.float32) if is_float(node) else dtype


def drop_dims(
    emitter: "Emitter", x: Node, dims: Sequence[int], keepdim: object
) -> Node:
    """Remove dims of size 1 unless they are kept."""
    return x if keepdim else emitter.call(aten.squeeze.dims, x, list(dims))
