"""Run a graph of scalars on tensors that broadcast: a ``score_mod`` or a ``mask_mod``.

flex_attention calls them with one score and four positions; what they compute is meant
for all of them. Invariant: a graph that is run here has nothing in it but ops on each
scalar alone and tensors that are read at scalars, so that both are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch.fx import GraphModule, Interpreter, Node

aten = torch.ops.aten


class NotScalar(Exception):  # noqa: N818
    """A graph does more than ops on each scalar alone.

    Attributes:
        because: what it does.
    """

    def __init__(self, because: str) -> None:
        super().__init__(because)
        self.because = because


def check_scalars(gm: GraphModule, num_scalars: int) -> None:
    """Refuse what can't be run on tensors that broadcast.

    Args:
        gm: the graph, as Dynamo hands it over.
        num_scalars: how many of its inputs are scalars; others are tensors to read.

    Raises:
        NotScalar: for an op that sees more than one scalar.
    """
    buffers = set(gm.graph.find_nodes(op="placeholder")[num_scalars:])
    read: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op not in {"call_function", "call_method"}:
            continue
        if name_of(node) == "getitem":
            _check_read(node, buffers | read)
            read.add(node)
        else:
            _check_pointwise(node, buffers | read)


def run_scalars(
    gm: GraphModule, scalars: Sequence[Tensor], buffers: Sequence[object]
) -> Tensor:
    """The graph's result for all elements of tensors that broadcast."""
    result = _Broadcasting(gm, garbage_collect_values=False).run(*scalars, *buffers)
    result = _finish(result[0] if isinstance(result, tuple) else result)
    assert isinstance(result, Tensor), "a score or a mask is a tensor"
    return result


def uses_scalar(gm: GraphModule, number: int) -> bool:
    """Whether the result may follow from one of the scalars."""
    users = gm.graph.find_nodes(op="placeholder")[number].users
    return any(name_of(user) not in MAKERS for user in users)


def is_constant(gm: GraphModule, num_scalars: int) -> bool:
    """Whether the result is one and the same for all scalars: a mask that keeps all."""
    (output,) = gm.graph.find_nodes(op="output")
    node = output.args[0]
    node = node[0] if isinstance(node, tuple) else node
    scalars = gm.graph.find_nodes(op="placeholder")[:num_scalars]
    makes_ones = isinstance(node, Node) and name_of(node) in {"new_ones", "ones"}
    return makes_ones and all(x in scalars for x in node.all_input_nodes)


def is_identity(gm: GraphModule) -> bool:
    """Whether the result is the first scalar."""
    (output,) = gm.graph.find_nodes(op="output")
    first = gm.graph.find_nodes(op="placeholder")[0]
    return output.args[0] in (first, (first,))


def name_of(node: Node) -> str:
    """An op's name whether it is called as a function, a method or an operator."""
    if isinstance(node.target, str):
        name = node.target
    else:
        name = getattr(node.target, "__name__", str(node.target))
    name = name.strip("_").partition(".")[0]
    return _SYNONYMS.get(name, name)


_SYNONYMS = MappingProxyType(
    {
        "and": "bitwise_and",
        "or": "bitwise_or",
        "xor": "bitwise_xor",
        "invert": "bitwise_not",
        "truediv": "div",
        "floordiv": "floor_divide",
        "mod": "remainder",
        "lshift": "bitwise_left_shift",
        "rshift": "bitwise_right_shift",
        "index": "getitem",
    }
)


# ---- what is allowed -----------------------------------------------------------------

# Elementwise, though torch does not tag them so; and makers of one scalar.
MAKERS = frozenset({"new_ones", "new_zeros", "new_full"})
_ALSO = MAKERS | {
    *("floor_divide", "rsub", "to", "type", "type_as", "float", "double", "half"),
    *("bfloat16", "int", "long", "bool", "ones", "zeros", "full"),
}


def _check_pointwise(node: Node, tensors: set[Node]) -> None:
    is_known = is_elementwise(name_of(node)) and not is_in_place(node)
    if not is_known or not _is_scalar(node):
        raise NotScalar(f"{node.target} isn't known to work on each scalar alone")
    wide = [x for x in node.all_input_nodes if x in tensors and not _is_scalar(x)]
    if wide:
        raise NotScalar(f"{node.target} takes all of {wide[0].name}")


def is_in_place(node: Node) -> bool:
    """Whether a call writes to its operand, by its name."""
    if isinstance(node.target, str):
        return node.target.endswith("_") and not node.target.endswith("__")
    name, module = (
        getattr(node.target, attribute, "") for attribute in ("__name__", "__module__")
    )
    return name.endswith("_") and module != "_operator"


def is_elementwise(name: str, others: frozenset[str] = frozenset()) -> bool:
    """Whether an op works on each element alone, or is one of ``others``."""
    if name in _ALSO or name in others:
        return True
    packet = getattr(aten, name, None)
    if packet is None:
        return False
    tags = [getattr(packet, overload).tags for overload in packet.overloads()]
    is_random = any(torch.Tag.nondeterministic_seeded in t for t in tags)
    return any(torch.Tag.pointwise in t for t in tags) and not is_random


def _is_scalar(node: Node) -> bool:
    value = node.meta.get("example_value")
    if isinstance(value, Tensor):
        return value.ndim == 0
    return isinstance(value, int | float | SymInt | SymFloat)


def _check_read(node: Node, tensors: set[Node]) -> None:
    x, index = node.args
    if not isinstance(x, Node) or x not in tensors:
        raise NotScalar(f"{node.name} reads an item of what isn't a tensor")
    for at in _as_tuple(index):
        is_place = isinstance(at, int) and not isinstance(at, bool)
        if not is_place and not (isinstance(at, Node) and _is_integer(at)):
            raise NotScalar(f"{node.name} reads {x.name} at {at}, which isn't a scalar")


def _is_integer(node: Node) -> bool:
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor) or value.ndim:
        return False
    return value.dtype in {torch.int32, torch.int64}


def _as_tuple(index: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return tuple(index) if isinstance(index, tuple | list) else (index,)


# ---- running -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor that is read at some of its first dims; others are still to come."""

    x: Tensor
    index: tuple[Any, ...]


class _Broadcasting(Interpreter):
    """Runs the graph on tensors that broadcast instead of scalars."""

    def run_node(self, n: Node) -> Any:  # noqa: ANN401
        if n.op in {"call_function", "call_method"} and name_of(n) == "getitem":
            (x, index), _ = self.fetch_args_kwargs_from_env(n)
            part = x if isinstance(x, _Part) else _Part(x, ())
            return _finish(_Part(part.x, (*part.index, *_as_tuple(index))))
        return super().run_node(n)


def _finish(value: object) -> object:
    """The element that is read, once all dims are given."""
    if not isinstance(value, _Part) or len(value.index) < value.x.ndim:
        return value
    x = value.x
    places: list[Any] = []
    for dim in reversed(range(x.ndim)):
        at = value.index[dim]
        if isinstance(at, int):
            x = x.select(dim, at)
        else:
            places.insert(0, at)
    return aten.index(x, places) if places else x
