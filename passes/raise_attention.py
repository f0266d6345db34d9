"""Replace every found attention by one ``ring_attention`` call on global shapes.

What computed scores, masks and weights is then dead and goes. Invariant: the graph's
outputs keep their shapes; the call's plan names its region until the real plan is made.
"""

from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from ringcompile.ops import RING_ATTENTION
from ringcompile.passes.op import shape_of
from ringcompile.passes.regions import BiasOperand, FactorOperand, Operand, Region
from ringcompile.passes.symbolic import Size
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten

_SEEDS = 2**31 - 1


def raise_attention(gm: GraphModule, regions: tuple[Region, ...]) -> dict[Node, Region]:
    """Edit ``gm``; return the region of each new call."""
    calls, results = {}, {}
    for index, region in enumerate(regions):
        call, results[region.output] = _write_call(gm.graph, index, region)
        calls[call] = region
    # Not before: a region may read what another one gives.
    for output, result in results.items():
        output.replace_all_uses_with(result)
        gm.graph.erase_node(output)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return calls


def _write_call(graph: Graph, index: int, region: Region) -> tuple[Node, Node]:
    """The call, and what it gives in the shape of the region's output."""
    output = region.output
    with graph.inserting_before(output):
        dtype = output.meta["val"].dtype
        q, k, v = (
            _write_operand(graph, o, dtype) for o in (region.q, region.k, region.v)
        )
        for factor in region.factors:
            q = _write_factor(graph, q, factor)
        seeds = [_write_seed(graph, q)] if region.dropout else []
        biases = [_write_bias(graph, bias, q) for bias in region.biases]
        sinks = _write_sinks(graph, region, q)
        args = (q, k, v, [*region.captures, *seeds], biases, sinks)
        call = graph.call_function(RING_ATTENTION, args, {"plan": f"attention {index}"})
        _set_value(call, output, (*region.q.shape[:3], region.v.shape[3]))
        result = call
        if region.transposed:
            result = _transpose(graph, call)
        result = _view(graph, result, shape_of(output))
    call.meta.update({k: x for k, x in output.meta.items() if k != "val"})
    return call, result


def _write_seed(graph: Graph, q: Node) -> Node:
    """A number drawn at each run; it is saved for backward, never drawn again."""
    value = q.meta["val"]
    node = graph.call_function(
        aten.randint.low,
        (0, _SEEDS, [1]),
        {"dtype": torch.int64, "device": value.device},
    )
    node.meta["val"] = value.new_empty((1,), dtype=torch.int64)
    return node


def _write_sinks(graph: Graph, region: Region, q: Node) -> Node | None:
    """A number for each head."""
    sinks, heads = region.sinks, region.q.shape[1]
    if sinks is None:
        return None
    if isinstance(sinks, Node):
        return _view(graph, sinks, (heads,))
    value = q.meta["val"]
    dtype = torch.promote_types(value.dtype, torch.float32)
    node = graph.call_function(
        aten.full.default,
        ([_write_size(graph, q, heads)], sinks),
        {"dtype": dtype, "device": value.device},
    )
    node.meta["val"] = value.new_empty((heads,), dtype=dtype)
    return node


def _write_operand(graph: Graph, operand: Operand, dtype: torch.dtype) -> Node:
    node = _view(graph, operand.node, operand.view) if operand.view else operand.node
    node = _cast(graph, node, dtype)
    return _transpose(graph, node) if operand.transposed else node


def _write_factor(graph: Graph, q: Node, factor: FactorOperand) -> Node:
    """Q times a tensor, in the dtype of Q."""
    other = _view(graph, factor.node, factor.view)
    target = aten.div.Tensor if factor.divides else aten.mul.Tensor
    node = graph.call_function(target, (q, other))
    node.meta.update(q.meta)
    node.meta["val"] = target(q.meta["val"], other.meta["val"])
    return _cast(graph, node, q.meta["val"].dtype)


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    if node.meta["val"].dtype == dtype:
        return node
    cast = graph.call_function(aten.to.dtype, (node, dtype))
    cast.meta.update(node.meta)
    cast.meta["val"] = node.meta["val"].to(dtype)
    return cast


def _write_bias(graph: Graph, bias: BiasOperand, q: Node) -> Node:
    node = _view(graph, bias.node, bias.view)
    if bias.factor != 1:
        scaled = graph.call_function(aten.mul.Tensor, (node, bias.factor))
        _set_value(scaled, node, bias.view)
        node = scaled
    if all(map(sizes_equal, bias.view, bias.shape)):
        return node
    rows = _write_size(graph, q, bias.shape[2])
    repeated = graph.call_function(aten.expand.default, (node, [-1, -1, rows, -1]))
    _set_value(repeated, node, bias.shape)
    return repeated


def _view(graph: Graph, node: Node, shape: Sequence[Size]) -> Node:
    """The node in another shape; itself if it has that one."""
    own = shape_of(node)
    if len(own) == len(shape) and all(map(sizes_equal, own, shape)):
        return node
    sizes = [_write_size(graph, node, size) for size in shape]
    assert sizes.count(-1) <= 1, f"{list(shape)} is no view of {list(own)}"
    view = graph.call_function(aten.reshape.default, (node, sizes))
    _set_value(view, node, shape)
    return view


def _write_size(graph: Graph, node: Node, size: Size) -> int | Node:
    """A size as a number, as a dim of ``node``, or as what is left."""
    if isinstance(size, int):
        return size
    for dim, own in enumerate(shape_of(node)):
        if sizes_equal(own, size):
            read = graph.call_function(aten.sym_size.int, (node, dim))
            read.meta["val"] = own
            return read
    return -1


def _transpose(graph: Graph, node: Node) -> Node:
    *lead, rows, columns = shape_of(node)
    result = graph.call_function(aten.transpose.int, (node, -2, -1))
    _set_value(result, node, (*lead, columns, rows))
    return result


def _set_value(node: Node, like: Node, shape: Sequence[Size]) -> None:
    """The meta of ``like``, with a value of another shape."""
    node.meta.update(like.meta)
    node.meta["val"] = like.meta["val"].new_empty(tuple(shape))
