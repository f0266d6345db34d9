"""Put the modules that score blocks into the graph, in front of their attentions.

Invariant: a scorer sees values that are equal on all ranks, so that its parameters get
the same, full gradient on each.
"""

import operator
from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from ringcompile import ops
from ringcompile.ir.text import parse_plan


def insert_scorers(gm: GraphModule, scorers: Mapping[int, nn.Module]) -> None:
    """Give attentions that learn what to keep their blocks' scores, as captures.

    Args:
        gm: the graph of this rank, changed in place.
        scorers: by the number of the attention.
    """
    for node in gm.graph.find_nodes(op="call_function", target=ops.RING_ATTENTION):
        scorer = scorers.get(parse_plan(node.kwargs["plan"]).index)
        if scorer is None:
            continue
        q, k, v, captures, *others = node.args
        with gm.graph.inserting_before(node):
            sums = gm.graph.call_function(
                ops.SUM_UP_BLOCKS, (q, k, captures), {"plan": node.kwargs["plan"]}
            )
            q_means, k_means, has_key = (
                gm.graph.call_function(operator.getitem, (sums, n)) for n in range(3)
            )
            scores = gm.graph.call_module(_add_module(gm, scorer), (q_means, k_means))
        node.args = (q, k, v, [*captures, scores, has_key], *others)
    gm.recompile()


def _add_module(gm: GraphModule, scorer: nn.Module) -> str:
    """The name of a scorer in the graph; one that serves many attentions has one."""
    for name, module in gm.named_children():
        if module is scorer:
            return name
    name = f"ring_scorer_{sum(1 for _ in gm.named_children())}"
    gm.add_submodule(name, scorer)
    return name
