"""Where the elements of an attention's tensors stand: batch, head, query, key.

Whatever dims a spelling uses, each element of scores and weights has a place ``i0`` in
the batch, a query head ``i1``, a query ``i2`` and a key ``i3``. From the result upwards
every node's index is written in these. Invariant: a dim of size 1 has index 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import sympy
from sympy import Expr
from torch.fx import Node

from ringcompile.ir.sums import canonical_sum, find_bounds, split_floor, split_terms
from ringcompile.passes.op import Op, is_tensor, shape_of
from ringcompile.passes.symbolic import Size, Unreadable, Value, index_symbol
from ringcompile.passes.value_views import VIEWS, Call, map_reshape
from ringcompile.torch_private import size_expression, sizes_equal

BATCH, HEAD, ROW, COLUMN = map(index_symbol, range(4))
NUM_DIMS = 4
_MATRIX = 2


@dataclass(frozen=True, slots=True)
class Grid:
    """Batch and heads of an attention, however many leading dims spell them.

    Attributes:
        batch: B.
        heads: query heads H.
        lead: index into each leading dim of the attention's result.
        flat: queries of each head, where heads and queries share the dim of rows.
    """

    batch: Size
    heads: Size
    lead: tuple[Expr, ...]
    flat: int | None = None

    @property
    def row(self) -> Expr:
        """Index into the dim of rows of the attention's result."""
        return ROW if self.flat is None else HEAD * self.flat + ROW

    @classmethod
    def of(cls, lead: Sequence[Size], heads: int = 1) -> "Grid":
        """The grid of leading dims ``()``, ``(B,)``, ``(B * H,)``, ``(B, H)`` or more.

        Args:
            lead: sizes of all dims of the result but the last two.
            heads: H where there is one leading dim.
        """
        match list(lead):
            case []:
                return cls(1, 1, ())
            case [size]:
                index = BATCH * heads + HEAD if heads > 1 else BATCH
                return cls(size // heads, heads, (_at(index, size),))
            case [batch, own]:
                return cls(batch, own, (_at(BATCH, batch), _at(HEAD, own)))
        batch, *rest = lead
        groups = [size for size in rest if isinstance(size, int)]
        if len(groups) < len(rest):
            raise Unreadable(f"heads in dims of sizes {rest}")
        heads = prod(groups)
        return cls(batch, heads, (_at(BATCH, batch), *_index_groups(heads, groups)))

    def settle(self, e: Expr) -> Expr:
        """``e`` in normal form, its head index known to be below H."""
        sizes = {HEAD: self.heads, ROW: self.flat}
        known = {s: size for s, size in sizes.items() if isinstance(size, int)}
        return settle(canonical_sum(e), known)

    def full(self, node: Node) -> list[Expr]:
        """The index into the leading dims of a tensor that ends in two others."""
        return align(shape_of(node)[:-_MATRIX], self.lead)


def _at(e: Expr, size: Size) -> Expr:
    return sympy.S.Zero if sizes_equal(size, 1) else e


def _index_groups(heads: int, groups: Sequence[int]) -> list[Expr]:
    """Index into each of the dims that heads are spelled in."""
    index = map_reshape([1, *groups], [1, heads])[1:]
    return [_at(e, size) for e, size in zip(index, groups, strict=True)]


def settle(e: Expr, sizes: Mapping[sympy.Symbol, int]) -> Expr:
    """Decide floors and remainders of one index alone, which is below its size."""
    known: dict[Expr, Expr] = {}
    for term in e.atoms(sympy.floor, sympy.Mod):
        is_floor = isinstance(term, sympy.floor)
        x, n = split_floor(term) if is_floor else (term.args[0], int(term.args[1]))
        if len(x.free_symbols) != 1 or not x.free_symbols <= sizes.keys():
            continue
        (symbol,) = x.free_symbols
        low, high = find_bounds(x.xreplace({symbol: sympy.S.Zero}))
        slope = split_terms(x)[0].get(symbol)
        if slope is None or low is None or high is None:
            continue
        ends = sorted((low, low + slope * (sizes[symbol] - 1)))
        if ends[0] // n == ends[1] // n:
            whole = sympy.Integer(ends[0] // n)
            known[term] = whole if is_floor else x - n * whole
    return canonical_sum(e.xreplace(known)) if known else e


# ---- from a result's element to an operand's -----------------------------------------


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


def climb(op: Op, slot: Node, index: Sequence[Expr], grid: Grid) -> list[Expr]:
    """The index into an operand of the element at ``index`` of the result.

    Args:
        op: a view, or an op on each element alone, which may broadcast.
        slot: the operand.
        index: of an element of the op's result.
        grid: of the attention.
    """
    step = read_index_map(op)
    if step is None:
        return align(shape_of(slot), index)
    here = {index_symbol(d): e for d, e in enumerate(index)}
    above = [grid.settle(e.xreplace(here)) for e in step]
    return [_at(e, size) for e, size in zip(above, shape_of(slot), strict=True)]


def align(shape: Sequence[Size], index: Sequence[Expr]) -> list[Expr]:
    """The index into a shape that broadcasts to the one that ``index`` is of."""
    own = index[len(index) - len(shape) :]
    return [_at(e, size) for e, size in zip(own, shape, strict=True)]


def is_view_of(
    node: Node, index: Sequence[Expr], shape: Sequence[Size], wanted: Sequence[Expr]
) -> bool:
    """Whether viewing ``node`` as ``shape`` puts at ``wanted`` what is at ``index``."""
    try:
        found = map_reshape(shape_of(node), shape)
    except Unreadable:
        return False
    at = {index_symbol(d): e for d, e in enumerate(wanted)}
    ones = [_at(e.xreplace(at), n) for e, n in zip(found, shape_of(node), strict=True)]
    return list(map(canonical_sum, ones)) == list(map(canonical_sum, index))


def multiply_out(sizes: Sequence[Size]) -> Size:
    """The product of sizes."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def divide(total: Size, by: Size) -> Size | None:
    """``total / by`` if that is whole for every size; None if not."""
    quotient = sympy.cancel(size_expression(total) / size_expression(by))
    if not quotient.is_Integer or quotient < 1:
        return None
    return int(quotient)
