"""Q, K and V of an attention: where they come from, and which dims are sequences.

Follows views upwards by their index maps, so a repeat of K over query heads is proven,
not recognised: head h of what attention reads must be head ``h // U`` of the source.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from sympy import Expr
from torch.fx import Node

from ringcompile.passes.op import Op, is_float, is_tensor, read_op, shape_of
from ringcompile.passes.parts import Refused
from ringcompile.passes.read_values import Reader
from ringcompile.passes.regions import Operand
from ringcompile.passes.symbolic import Size, Unreadable, Value, index_symbol
from ringcompile.passes.value_views import VIEWS, Call, indices
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten

_NUM_DIMS = 4  # (B, H, S, D)
_NOT_FOLLOWED = {aten.detach, aten.detach_}  # detach stops the gradient
_MAKE_FEATURES = {aten.linear, aten.addmm, aten.mm, aten.embedding}
_SPLITS = {aten.split, aten.chunk, aten.split_with_sizes, aten.tensor_split}


# ---- where K and V come from ---------------------------------------------------------


def find_operand(
    reader: Reader, node: Node, *, heads: Size, transposed: bool = False
) -> Operand:
    """The tensor furthest up that has the same rows, un-repeated over query heads.

    Args:
        reader: reads the graph.
        node: a 4-D node, ``(B, H, S, D)``.
        heads: number of query heads H.
        transposed: whether ``node`` is ``(B, H, D, S)`` instead.

    Returns:
        An operand of G heads, of which query head h uses number ``h // (H / G)``; in
        the order ``(B, G, S, D)`` if there is such a tensor.
    """
    rows = index_symbol(3 if transposed else 2), index_symbol(2 if transposed else 3)
    best = Operand(node, transposed)
    for source, index in _follow_views(reader, node):
        if len(index) != _NUM_DIMS or not _same_batch(source, node):
            continue
        head = _head_of(source, heads)
        if index == _without_ones(source, [index_symbol(0), head, *rows]):
            best = Operand(source)
        elif index == _without_ones(source, [index_symbol(0), head, *rows[::-1]]):
            best = Operand(source, transposed=True) if best.transposed else best
    return best


def find_operands(
    reader: Reader, q: Node, k: Node, v: Node, *, k_transposed: bool = False
) -> tuple[Operand, Operand, Operand]:
    """Q, K and V; K and V with equally many heads.

    Args:
        reader: reads the graph.
        q: ``(B, H, S, D)``.
        k: ``(B, G, S, D)``, or ``(B, G, D, S)`` if ``k_transposed``.
        v: ``(B, G, S, E)``.
        k_transposed: see ``k``.
    """
    if any(reader.is_mutated(n) for n in (q, k, v)):
        raise Refused(
            "attention on a Q, K or V that is changed in place",
            because="which of its states is meant isn't read",
            instead="compute Q, K and V without in-place ops",
        )
    heads = shape_of(q)[1]
    keys = find_operand(reader, k, heads=heads, transposed=k_transposed)
    values = find_operand(reader, v, heads=heads)
    if not _same_heads(keys, values):
        keys, values = Operand(k, k_transposed), Operand(v)
    if not _same_heads(keys, values):
        raise Refused(
            f"attention with {shape_of(k)[1]} heads of K and {shape_of(v)[1]} of V",
            because="K and V travel together, head by head",
            instead="give K and V equally many heads",
        )
    queries = find_operand(reader, q, heads=heads)
    if not sizes_equal(shape_of(queries.node)[1], heads):
        queries = Operand(q)
    return queries, keys, values


def _same_heads(k: Operand, v: Operand) -> bool:
    return sizes_equal(shape_of(k.node)[1], shape_of(v.node)[1])


def _follow_views(reader: Reader, node: Node) -> Iterator[tuple[Node, list[Expr]]]:
    """Each node that ``node`` is a view of, and its index at an element of ``node``."""
    index = _without_ones(node, indices(len(shape_of(node))))
    while True:
        yield node, index
        op = read_op(node)
        if op is None or op.packet in _NOT_FOLLOWED or reader.is_mutated(node):
            return
        step = read_index_map(op)
        if step is None:
            return
        here = {index_symbol(d): e for d, e in enumerate(index)}
        node = op.slots[0]
        index = _without_ones(node, [e.xreplace(here) for e in step])


def read_index_map(op: Op) -> list[Expr] | None:
    """The index into a view's input of each of its elements; None if no such view."""
    if op.packet not in VIEWS or not op.slots or not is_tensor(op.node):
        return None
    source, value = op.slots[0].meta["val"], op.node.meta["val"]
    if source.dtype != value.dtype:
        return None
    x = Value(tuple(source.shape), source.dtype, ())
    try:
        return VIEWS[op.packet](Call(op, lambda _: x), x)
    except Unreadable:
        return None


def _without_ones(node: Node, index: list[Expr]) -> list[Expr]:
    shape = shape_of(node)
    return [
        sympy.S.Zero if sizes_equal(size, 1) else e
        for size, e in zip(shape, index, strict=True)
    ]


def _same_batch(source: Node, node: Node) -> bool:
    return sizes_equal(shape_of(source)[0], shape_of(node)[0])


def _head_of(source: Node, heads: Size) -> Expr:
    """The source's head that query head ``i1`` must use."""
    own: Size = shape_of(source)[1]
    head = index_symbol(1)
    if isinstance(own, int) and isinstance(heads, int) and not heads % own:
        return sympy.floor(head / (heads // own))
    return head


# ---- which dims are sequences --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """A dim of a node."""

    node: Node
    dim: int

    @property
    def is_last(self) -> bool:
        return self.dim == len(shape_of(self.node)) - 1


def carries_sequence(node: Node, dim: int) -> bool:
    """Whether a dim runs over tokens: not over features, nor over rows of a weight.

    Follows the dim upwards: the last dim of a linear layer or an embedding is features;
    a parameter's dims are weights; an input's, and what no rule knows, are tokens.
    """
    work, seen = [_Place(node, dim % len(shape_of(node)))], set()
    while work:
        place = work.pop()
        if place in seen:
            continue
        seen.add(place)
        above = _find_above(place)
        if above is True:
            return True
        if above is not False:
            work += above
    return False


def _find_above(place: _Place) -> bool | list[_Place]:
    """The answer, or the dims that decide it."""
    node = place.node
    if node.op == "placeholder":
        return not node.meta.get("is_parameter", False)
    if node.target is operator.getitem:
        return _above_split(node, place.dim)
    op = read_op(node)
    return False if op is None else _above_op(op, place)


def _above_op(op: Op, place: _Place) -> bool | list[_Place]:
    if op.packet in _MAKE_FEATURES:
        return not place.is_last
    if op.packet is aten.matmul:
        return [_above_product(op, place)]
    index = read_index_map(op)
    if index is not None:
        symbol = index_symbol(place.dim)
        source = op.slots[0]
        return [_Place(source, d) for d, e in enumerate(index) if e.has(symbol)]
    return _above_elementwise(op, place)


def _above_product(op: Op, place: _Place) -> _Place:
    """Columns come from the second operand; all else from the first."""
    slot = 1 if place.is_last else 0
    operand = op.slots[slot]
    from_end = place.dim - len(shape_of(place.node))
    return _Place(operand, max(len(shape_of(operand)) + from_end, 0))


def _above_split(node: Node, dim: int) -> bool | list[_Place]:
    pieces = node.args[0]
    op = read_op(pieces) if isinstance(pieces, Node) else None
    if op is None:
        return True
    if op.packet in _SPLITS:
        return [_Place(op.slots[0], dim)]
    if op.packet is aten.unbind:
        gone = op.args["dim"] % len(shape_of(op.slots[0]))
        return [_Place(op.slots[0], dim + (dim >= gone))]
    return True


def _above_elementwise(op: Op, place: _Place) -> bool | list[_Place]:
    """Operands that have this dim too; an op that is none of the known makes tokens."""
    shape = shape_of(place.node)
    from_end = place.dim - len(shape)
    above = [
        _Place(x, len(shape_of(x)) + from_end)
        for x in op.slots
        if is_float(x)
        and len(shape_of(x)) + from_end >= 0
        and sizes_equal(shape_of(x)[from_end], shape[place.dim])
    ]
    return above or True
