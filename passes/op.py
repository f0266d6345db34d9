"""One call of the graph with its arguments under their schema names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from ringcompile.torch_private import settle_size


@dataclass(frozen=True, slots=True)
class Op:
    """A ``call_function`` of an ATen (or our own) op.

    Attributes:
        node: the call.
        overload: the op that is called.
        args: every argument by its schema name, defaults filled in.
        slots: the tensor operands, one per occurrence, in schema order.
        slot_names: the argument that each slot stands in.
    """

    node: Node
    overload: OpOverload
    args: dict[str, Any]
    slots: tuple[Node, ...]
    slot_names: tuple[str, ...]

    @property
    def packet(self) -> OpOverloadPacket:
        """The op without its overload, which rules are found by."""
        packet: OpOverloadPacket = self.overload.overloadpacket
        return packet

    @property
    def is_mutable(self) -> bool:
        """Whether it writes an operand in place."""
        return schema_of(self.overload).is_mutable

    def slot(self, name: str) -> int | None:
        """The slot of a single-tensor argument; None when it isn't given."""
        return self.slot_names.index(name) if name in self.slot_names else None

    def rank(self, slot: int) -> int:
        """Number of dims of the tensor in ``slot``."""
        return len(shape_of(self.slots[slot]))

    def with_slots(self, new: list[Node]) -> dict[str, Any]:
        """The arguments with the tensors of the slots replaced in order."""
        pending = iter(new)
        return {
            k: _map_tensors(v, lambda _: next(pending)) for k, v in self.args.items()
        }


def read_op(node: Node) -> Op | None:
    """Read a call by its schema; None for anything that is no op of a library."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    args: dict[str, Any] = {}
    for position, argument in enumerate(schema_of(node.target).arguments):
        if argument.name in node.kwargs:
            args[argument.name] = node.kwargs[argument.name]
        elif position < len(node.args):
            args[argument.name] = node.args[position]
        else:
            args[argument.name] = argument.default_value
    slots: list[Node] = []
    names: list[str] = []
    for name, value in args.items():
        before = len(slots)
        _map_tensors(value, _append(slots))
        names += [name] * (len(slots) - before)
    return Op(node, node.target, args, tuple(slots), tuple(names))


def schema_of(target: OpOverload) -> torch.FunctionSchema:
    """The op's schema: argument names, defaults, what it writes."""
    return target._schema  # noqa: SLF001 - torch has no public name for it


def call_arguments(
    target: OpOverload, args: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, from arguments by name."""
    schema = schema_of(target).arguments
    positional = tuple(args[a.name] for a in schema if not a.kwarg_only)
    keyword = {
        a.name: args[a.name]
        for a in schema
        if a.kwarg_only and args[a.name] != a.default_value
    }
    return positional, keyword


def _append(slots: list[Node]) -> Callable[[Node], Node]:
    def add(node: Node) -> Node:
        slots.append(node)
        return node

    return add


def _map_tensors(value: Argument, fn: Callable[[Node], Node]) -> Argument:
    return map_arg(value, lambda n: fn(n) if is_tensor(n) else n)


def is_tensor(node: Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def shape_of(node: Node) -> torch.Size:
    """Global shape of the node's value (of its first tensor, if it has several)."""
    value = node.meta["val"]
    shape = value.shape if isinstance(value, Tensor) else value[0].shape
    return torch.Size(map(settle_size, shape))


def is_complex(node: Node) -> bool:
    """Whether the node's value is a complex tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def is_float(node: Node) -> bool:
    """Whether the node's value is a floating-point tensor."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, Tensor) and value.dtype.is_floating_point
