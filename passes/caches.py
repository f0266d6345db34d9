"""Keys and values that a model returns for a cache, which training has no use for.

Hugging Face models return every layer's K and V unless told ``use_cache=False``. As
outputs they are made whole on every rank, and so are their gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ringcompile.passes.regions import Region
from ringcompile.torch_private import size_hint

aten = torch.ops.aten

_SAME_VALUE = {aten.alias, aten.clone, aten.contiguous, aten.to, aten._to_copy}  # noqa: SLF001

CACHE_ADVICE = (
    "the model returns its keys and values, and training has no use for them; each is"
    " made whole on every rank, and so is its gradient: call the model with"
    " use_cache=False, or set it in the model's config"
)


def find_cache_outputs(regions: Sequence[Region]) -> tuple[int, ...]:
    """Find the numbers of a graph's outputs that are keys or values of its attentions.

    Args:
        regions: attentions of one graph.

    Returns:
        The outputs' numbers; none if no gradient will be asked for.
    """
    if not regions:
        return ()
    graph = regions[0].k.node.graph
    inputs = graph.find_nodes(op="placeholder")
    if not (torch.is_grad_enabled() and any(map(_needs_grad, inputs))):
        return ()
    kept = {_origin(o.node) for region in regions for o in (region.k, region.v)}
    outputs: list[Node] = []
    map_arg(graph.output_node().args[0], outputs.append)
    return tuple(n for n, node in enumerate(outputs) if _origin(node) in kept)


def _needs_grad(node: Node) -> bool:
    return bool(node.meta.get("requires_grad"))


def _origin(node: Node) -> Node:
    """Where a value comes from, over copies and over an empty cache put before it."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _SAME_VALUE:
        return _origin(node.all_input_nodes[0])
    if packet is aten.cat:
        filled = [n for n in node.all_input_nodes if not _is_empty(n)]
        if len(filled) == 1:
            return _origin(filled[0])
    return node


def _is_empty(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and 0 in map(size_hint, value.shape)
