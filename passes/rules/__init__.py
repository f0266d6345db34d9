"""Rules: how each class of ops passes dims on, and so what runs on shards as it is.

A rule maps an op and the dims of its operands to a ``Flow``: the dims of its result
and the *links*, pairs of operand dim and result dim along which the op is local:
``op(x)[shard] == op(x[shard])``. Invariant: a dim without a link is never sharded.
"""

from collections.abc import Callable

import torch
from torch._ops import OpOverloadPacket

from ringcompile.passes.dims import Dims, Factors
from ringcompile.passes.op import Op
from ringcompile.passes.rules import (
    contractions,
    losses,
    pieces,
    pointwise,
    selections,
    views,
)
from ringcompile.passes.rules.flow import Flow

Rule = Callable[[Op, Factors, list[Dims]], Flow | None]

RULES: dict[OpOverloadPacket, Rule] = {
    **views.RULES,
    **contractions.RULES,
    **selections.RULES,
    **pieces.RULES,
    **losses.RULES,
    **pointwise.RULES,
}


def find_rule(op: Op) -> Rule | None:
    """The rule of an op's class; None for an op that no rule knows."""
    rule = RULES.get(op.packet)
    if rule is not None:
        return rule
    tags = op.overload.tags
    if torch.Tag.nondeterministic_seeded in tags:
        return None
    return pointwise.broadcast if torch.Tag.pointwise in tags else None
