"""Which nodes write memory, and which may share it.

Where a node's storage is written to, what the node holds depends on when it is read;
such nodes are not read at all. Invariant: two nodes of different bases share no memory.
"""

import operator

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from ringcompile.passes.op import read_op, schema_of

aten = torch.ops.aten

# May return their input although their schemas do not say so.
_MAY_ALIAS = {aten.type_as, aten.dropout, aten.feature_dropout}
_CASTS = {aten.to, aten.type_as}
# Writes nothing that a tensor holds.
_HARMLESS = {aten.detach_}


def writes_memory(node: Node) -> bool:
    """Whether the node is an op that writes to an argument."""
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, OpOverload)
        and schema_of(target).is_mutable
        and target.overloadpacket not in _HARMLESS
    )


def find_mutated(graph: Graph) -> frozenset[Node]:
    """Bases whose memory some op of the graph writes to."""
    return frozenset(
        find_base(value)
        for node in graph.nodes
        if writes_memory(node)
        for value in find_written(node)
    )


def find_written(node: Node) -> list[Node]:
    """The arguments that an op writes to."""
    op = read_op(node)
    assert op is not None, "what writes memory is an op"
    written: list[object] = []
    for argument in schema_of(op.overload).arguments:
        value = op.args[argument.name]
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += value if isinstance(value, list | tuple) else [value]
    return [n for n in written if isinstance(n, Node)]


def find_base(node: Node) -> Node:
    """The node that made the memory which ``node`` may be a view of."""
    while _may_alias(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _may_alias(node: Node) -> bool:
    target = node.target
    if target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, Node), "an item of a result of several"
        if source.op != "call_function" or not isinstance(source.target, OpOverload):
            return True
        # The parts of a split share memory, the results of topk do not.
        return _may_alias(source)
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return False
    if target.overloadpacket in _CASTS and not _keeps_dtype(node):
        return False
    if target.overloadpacket in _MAY_ALIAS:
        return True
    return any(r.alias_info is not None for r in schema_of(target).returns)


def _keeps_dtype(node: Node) -> bool:
    before, after = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return True
    return before.dtype == after.dtype
