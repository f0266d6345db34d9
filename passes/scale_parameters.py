"""Scale the gradients of a graph's parameters, where nothing else of it is rewritten.

Every rank runs such a graph whole and has whole gradients; a wrapper that sums
gradients over the ranks would count them P times. Invariant: values are left alone.
"""

from collections.abc import Sequence

from torch import nn
from torch.fx import GraphModule

from ringcompile.ops import SCALE_GRAD


def scale_parameters(
    gm: GraphModule, example_inputs: Sequence[object], factor: float
) -> None:
    """Multiply the gradient of each parameter in ``gm`` by ``factor``.

    Args:
        gm: a Dynamo graph; edited in place.
        example_inputs: its inputs, in placeholder order.
        factor: 1.0 leaves the graph as it is.
    """
    if factor == 1.0:
        return
    placeholders = gm.graph.find_nodes(op="placeholder")
    parameters = [
        node
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, nn.Parameter) and value.requires_grad
    ]
    with gm.graph.inserting_after(placeholders[-1]):
        for node in parameters:
            scaled = gm.graph.call_function(SCALE_GRAD, (node, factor))
            scaled.meta.update(node.meta)
            node.replace_all_uses_with(
                scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled
            )
    gm.recompile()
