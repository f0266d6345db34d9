"""Spell out what autocast does to the operands of an attention.

Under autocast an op gets its operands in another dtype than the graph says. Invariant:
autocast stays where it was and finds nothing left to cast at these ops, so the graph
computes what it did; an attention's operands have the dtype that it computes in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ringcompile.autocast import find_autocast_dtype
from ringcompile.passes.op import Op, call_arguments, is_tensor, read_op
from ringcompile.torch_private import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
)

aten = torch.ops.aten

# Of all ops that autocast runs in low precision, those that attentions are made of.
_LOWERED = frozenset(
    {
        aten.scaled_dot_product_attention,
        aten.matmul,
        aten.mm,
        aten.bmm,
        aten.baddbmm,
        aten.einsum,
    }
)
_KEPT = (torch.float64,)  # autocast leaves these as they are


def spell_autocast(gm: GraphModule) -> int:
    """Insert casts into ``gm``; return the number of ops that got some."""
    entered: list[Node] = []
    edits = 0
    for node in list(gm.graph.nodes):
        if node.target is ENTER_AUTOCAST:
            entered.append(node)
        elif node.target is EXIT_AUTOCAST:
            entered.remove(node.args[0])
        elif (op := read_op(node)) is not None and op.packet in _LOWERED:
            edits += _cast_operands(op, entered)
    if edits:
        gm.recompile()
    return edits


def has_autocast(graph: Graph) -> bool:
    """Whether any op of a graph may run under autocast."""
    devices = {n.meta["val"].device.type for n in graph.nodes if is_tensor(n)}
    return any(n.target is ENTER_AUTOCAST for n in graph.nodes) or any(
        find_autocast_dtype(device) is not None for device in devices
    )


def _cast_operands(op: Op, entered: Sequence[Node]) -> bool:
    dtype = _find_dtype(op.slots[0].meta["val"].device.type, entered)
    if dtype is None or not any(_is_cast(n, dtype) for n in op.slots):
        return False
    node = op.node
    with node.graph.inserting_before(node):
        operands = [_cast(n, dtype) if _is_cast(n, dtype) else n for n in op.slots]
    node.args, node.kwargs = call_arguments(op.overload, op.with_slots(operands))
    return True


def _find_dtype(device: str, entered: Sequence[Node]) -> torch.dtype | None:
    """The dtype that the innermost mode lowers to; None where autocast is off."""
    for node in reversed(entered):
        device_type, dtype, enabled, *_ = node.args
        if device_type == device:
            default = torch.get_autocast_dtype(device)
            chosen = dtype if isinstance(dtype, torch.dtype) else default
            return chosen if enabled else None
    return find_autocast_dtype(device)  # around the whole graph


def _is_cast(node: Node, dtype: torch.dtype) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype not in (dtype, *_KEPT)
    )


def _cast(x: Node, dtype: torch.dtype) -> Node:
    node = x.graph.call_function(aten.to.dtype, (x, dtype))
    node.meta.update(x.meta)
    node.meta["val"] = x.meta["val"].to(dtype)
    return node
