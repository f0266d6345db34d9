"""Q, K and V of an attention: where they come from, and which dims are sequences.

Follows views upwards by their index maps, so a repeat of K over query heads is proven,
not recognised: head h of what attention reads must be head ``h // U`` of the source.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch
from sympy import Expr
from torch.fx import Node

from ringcompile.passes.coordinates import (
    BATCH,
    COLUMN,
    HEAD,
    NUM_DIMS,
    ROW,
    Grid,
    align,
    climb,
    divide,
    is_view_of,
    multiply_out,
    read_index_map,
)
from ringcompile.passes.op import Op, is_float, read_op, shape_of
from ringcompile.passes.parts import Refused
from ringcompile.passes.read_values import Reader
from ringcompile.passes.regions import Operand
from ringcompile.passes.symbolic import Size, index_symbol
from ringcompile.torch_private import size_expression, sizes_equal

aten = torch.ops.aten

CASTS = {aten.to, aten._to_copy, aten.type_as}  # noqa: SLF001
NOT_FOLLOWED = {aten.detach, aten.detach_}  # detach stops the gradient
_MAKE_FEATURES = {aten.linear, aten.addmm, aten.mm, aten.embedding}
PRODUCTS = {aten.matmul, aten.bmm, aten.baddbmm}
_SPLITS = {aten.split, aten.chunk, aten.split_with_sizes, aten.tensor_split}


# ---- where Q, K and V come from ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """A Q, K or V as the attention spells it.

    Attributes:
        node: the node.
        index: of each of its elements, ``ROW`` being the token and ``COLUMN`` the
            feature.
        length: tokens.
        features: D or E.
    """

    node: Node
    index: Sequence[Expr]
    length: Size
    features: Size

    @classmethod
    def of(cls, node: Node, lead: Sequence[Expr], *, transposed: bool) -> "Rows":
        """Of ``(..., S, D)``, or ``(..., D, S)`` if ``transposed``."""
        sizes, at = shape_of(node)[-2:], (ROW, COLUMN)
        matrix = align(sizes, at[::-1] if transposed else at)
        length, features = sizes[::-1] if transposed else sizes
        return cls(node, [*lead, *matrix], length, features)


def find_operands(
    reader: Reader,
    rows: tuple[Rows, Rows, Rows],
    grid: Grid,
    dtype: torch.dtype,
    *,
    is_cast: bool,
) -> tuple[Operand, Operand, Operand]:
    """Q with H heads; K and V with equally many, as few as they have un-repeated.

    Args:
        reader: reads the graph.
        rows: Q, K and V as they are spelled.
        grid: batch and heads.
        dtype: of the result, which all three must have, if need be before a cast.
        is_cast: whether the attention casts them itself, as under autocast.
    """
    if any(reader.is_mutated(x.node) for x in rows):
        raise Refused(
            "attention on a Q, K or V that is changed in place",
            because="which of its states is meant isn't read",
            instead="compute Q, K and V without in-place ops",
        )
    found = [_find_sources(reader, x, grid) for x in rows]
    queries, keys, values = (
        _of_dtype(sources, dtype, is_cast=is_cast) for sources in found
    )
    if not (queries and keys and values):
        dtypes = {str(x.node.meta["val"].dtype) for x in rows} | {str(dtype)}
        raise Refused(
            f"attention on Q, K, V and result of {sorted(dtypes)}",
            because="a ring computes in the one dtype of its operands",
            instead="cast Q, K and V to one dtype",
        )
    q, k, v = (x.node for x in rows)
    heads = size_expression(grid.heads)
    if heads not in queries:
        raise Refused(
            f"attention of {grid.heads} query heads, batch {grid.batch}, by a Q of"
            f" shape {list(shape_of(q))}",
            because="Q would be broadcast or shuffled over heads or batch",
            instead="give Q the batch size and number of heads of the scores",
        )
    shared = [own for own in keys if own in values]
    if not shared:
        raise Refused(
            f"attention of {grid.heads} query heads, batch {grid.batch}, with K of"
            f" shape {list(shape_of(k))} and V of {list(shape_of(v))}",
            because="K and V travel together, head by head, for a group of query heads",
            instead="give K and V equally many heads, and the batch size of Q",
        )
    fewest = min(shared, key=_as_number)
    return queries[heads], keys[fewest], values[fewest]


def _of_dtype(
    sources: dict[tuple[Expr, torch.dtype], Operand],
    dtype: torch.dtype,
    *,
    is_cast: bool,
) -> dict[Expr, Operand]:
    """By number of heads; of another dtype only where ``is_cast``."""
    others = {heads: o for (heads, _), o in sources.items() if is_cast}
    return others | {heads: o for (heads, d), o in sources.items() if d == dtype}


def _as_number(size: Expr) -> float:
    return float(size) if size.is_Integer else float("inf")


def _find_sources(
    reader: Reader, rows: Rows, grid: Grid
) -> dict[tuple[Expr, torch.dtype], Operand]:
    """For each number of heads and dtype the best tensor, furthest up, of these rows.

    Query head h uses head ``h // (H / G)`` of one of G heads. ``(B, G, S, D)`` itself
    is better than a tensor that is to be viewed so, and that than ``(B, G, D, S)``.
    """
    best: dict[tuple[Expr, torch.dtype], tuple[int, Operand]] = {}
    for source, index in _follow_views(reader, rows, grid):
        for transposed in (False, True):
            operand = _match(source, index, rows, grid, transposed=transposed)
            if operand is None:
                continue
            key = size_expression(operand.shape[1]), source.meta["val"].dtype
            merit = 2 * (not transposed) + (not operand.view)
            if key not in best or merit >= best[key][0]:
                best[key] = merit, operand
    return {key: operand for key, (_, operand) in best.items()}


def _match(
    source: Node, index: Sequence[Expr], rows: Rows, grid: Grid, *, transposed: bool
) -> Operand | None:
    shape = shape_of(source)
    matrix, at = [rows.length, rows.features], [ROW, COLUMN]
    if transposed:
        matrix, at = matrix[::-1], at[::-1]
    heads = _find_own_heads(shape, rows, grid)
    head = None if heads is None else _head_of(heads, grid.heads)
    if heads is None or head is None:
        return None
    sizes = (grid.batch, heads, *matrix)
    wanted = align(sizes, (BATCH, head, *at))
    if len(shape) == NUM_DIMS and all(map(sizes_equal, shape, sizes)):
        return Operand(source, transposed) if list(index) == wanted else None
    if not is_view_of(source, index, sizes, wanted):
        return None
    return Operand(source, transposed, sizes)


def _find_own_heads(shape: Sequence[Size], rows: Rows, grid: Grid) -> Size | None:
    if len(shape) == NUM_DIMS and sizes_equal(shape[0], grid.batch):
        own = multiply_out(shape[2:]), rows.length * rows.features
        if sizes_equal(*own):
            return shape[1]
    each = multiply_out([grid.batch, rows.length, rows.features])
    return divide(multiply_out(shape), each)


def _head_of(own: Size, heads: Size) -> Expr | None:
    """The source's head that query head ``i1`` must use."""
    if sizes_equal(own, heads):
        return HEAD
    if isinstance(own, int) and isinstance(heads, int) and not heads % own:
        return sympy.floor(HEAD / (heads // own))
    return None


def _follow_views(
    reader: Reader, rows: Rows, grid: Grid
) -> Iterator[tuple[Node, list[Expr]]]:
    """Each node that a Q, K or V is a view of, and the index into it."""
    node, index = rows.node, list(rows.index)
    while True:
        yield node, index
        op = read_op(node)
        if op is None or op.packet in NOT_FOLLOWED or reader.is_mutated(node):
            return
        if read_index_map(op) is None and not is_widened(op):
            return
        node, index = op.slots[0], climb(op, op.slots[0], index, grid)


def is_widened(op: Op) -> bool:
    """Whether a cast gives the same numbers in a wider dtype, as scores have anyway."""
    if op.packet not in CASTS or not op.slots or not is_float(op.slots[0]):
        return False
    before, after = (n.meta["val"].dtype for n in (op.slots[0], op.node))
    return bool(before != after == torch.promote_types(before, after))


def find_heads(nodes: Sequence[Node], lead: Sequence[Size]) -> int:
    """H, where the one leading dim of Q, K or V is B and H laid end to end; else 1."""
    grid = Grid.of(lead)
    return next((n for node in nodes if (n := _find_heads(node, grid)) > 1), 1)


def _find_heads(node: Node, grid: Grid) -> int:
    op, index = read_op(node), [*map(index_symbol, range(len(shape_of(node))))]
    while op is not None and op.slots and _keeps_places(op):
        slot = op.slots[0]
        index = climb(op, slot, index, grid)
        for e in index:
            if isinstance(e, sympy.Mod) and e.args[0] == BATCH:
                return int(e.args[1])
        op = read_op(slot)
    return 1


def _keeps_places(op: Op) -> bool:
    if read_index_map(op) is not None:
        return True
    return torch.Tag.pointwise in op.overload.tags or op.packet in CASTS


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
    if op.packet in PRODUCTS:
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
    operand = op.slots[-2:][slot]
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
