"""Replace every found attention by one ``ring_attention`` call on global shapes.

What computed scores, masks and weights is then dead and goes. Invariant: the graph's
outputs keep their shapes; the call's plan names its region until the real plan is made.
"""

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ringcompile.ops import RING_ATTENTION
from ringcompile.passes.regions import Operand, Region

_SEEDS = 2**31 - 1


def raise_attention(gm: GraphModule, regions: tuple[Region, ...]) -> dict[Node, Region]:
    """Edit ``gm``; return the region of each new call."""
    calls = {_replace(gm.graph, i, region): region for i, region in enumerate(regions)}
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return calls


def _replace(graph: Graph, index: int, region: Region) -> Node:
    output = region.output
    with graph.inserting_before(output):
        q, k, v = (_write_operand(graph, o) for o in (region.q, region.k, region.v))
        seeds = [_write_seed(graph, q)] if region.dropout else []
        call = graph.call_function(
            RING_ATTENTION,
            (q, k, v, [*region.captures, *seeds], []),
            {"plan": f"attention {index}"},
        )
    call.meta.update(output.meta)
    output.replace_all_uses_with(call)
    graph.erase_node(output)
    return call


def _write_seed(graph: Graph, q: Node) -> Node:
    """A number drawn at each run; it is saved for backward, never drawn again."""
    value = q.meta["val"]
    node = graph.call_function(
        torch.ops.aten.randint.low,
        (0, _SEEDS, [1]),
        {"dtype": torch.int64, "device": value.device},
    )
    node.meta["val"] = value.new_empty((1,), dtype=torch.int64)
    return node


def _write_operand(graph: Graph, operand: Operand) -> Node:
    if not operand.transposed:
        return operand.node
    node = graph.call_function(torch.ops.aten.transpose.int, (operand.node, 2, 3))
    value = operand.node.meta["val"]
    assert isinstance(value, Tensor), "an operand is a tensor"
    node.meta.update(operand.node.meta)
    node.meta["val"] = value.transpose(2, 3)
    return node
