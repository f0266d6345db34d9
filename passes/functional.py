"""The functional twin of an op that writes in place, and calls put beside old ones."""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from ringcompile.passes.memory import find_written, writes_memory
from ringcompile.passes.op import read_op, schema_of


def find_functional(node: Node) -> OpOverload | None:
    """The op that returns what this in-place op writes, if it has the same arguments.

    None for ops that draw random numbers, and where the result would have another shape
    or dtype, which writing in place forces back.
    """
    target = node.target
    if not isinstance(target, OpOverload) or not writes_memory(node):
        return None
    namespace, _, name = schema_of(target).name.partition("::")
    if not name.endswith("_") or find_written(node) != [node.args[0]]:
        return None
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = target.name().partition(".")[2] or "default"
    functional = getattr(packet, overload, None)
    if not isinstance(functional, OpOverload):
        return None
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    same = _argument_names(target) == _argument_names(functional)
    is_twin = same and not is_random and _gives_the_same(node, functional)
    return functional if is_twin else None


def _argument_names(op: OpOverload) -> list[str]:
    return [argument.name for argument in schema_of(op).arguments]


def _gives_the_same(node: Node, functional: OpOverload) -> bool:
    op, before = read_op(node), node.meta["val"]
    assert op is not None, "an in-place op is an op"
    args = op.with_slots([n.meta["val"] for n in op.slots])
    if any(isinstance(v, Node) for v in args.values()):
        return False
    result = functional(**args)
    return (
        isinstance(result, Tensor)
        and result.dtype == before.dtype
        and result.shape == before.shape
    )


def call_like(like: Node, target: OpOverload, *args: object, **kwargs: object) -> Node:
    """A new call with the meta of the node that it is for, and a value of its own."""
    node = like.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
    node.meta.update(like.meta)
    values: Any = map_arg((args, kwargs), lambda n: n.meta["val"])  # type: ignore[type-var]
    node.meta["val"] = target(*values[0], **values[1])
    return node
