"""Which blocks of pairs count, where tensors say it: captures, or tables of blocks.

Ranges of what a mask compares, over a block's queries and over its keys, decide whether
all of a block's pairs count, or may: documents are runs of equal numbers, so most
blocks are decided. What captures decide is a few small tensors in the user's graph,
made anew each time. Invariant: a block that is left out holds no pair that counts, and
in a full one all do, whatever integers captures hold.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.evaluate import evaluate_value, read_capture
from ringcompile.ir.mask import (
    B,
    H,
    K,
    Q,
    capture,
    disjunction,
    equals_zero,
    is_capture,
    is_table,
    negate,
)
from ringcompile.ir.sums import split_floor
from ringcompile.ir.tables import RandomBlocks, parse_table
from ringcompile.torch_private import BlockLists

_ROWS, _COLUMNS = 2, 3  # dims of queries and keys


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs that blocks are cut out of.

    Attributes:
        at: ``(b, h, q, k)`` of them, int64, which broadcast to ``(B, H, n, m)``.
        captures: what masks read.
        block: rows and columns of a block.
    """

    at: tuple[Tensor, Tensor, Tensor, Tensor]
    captures: Sequence[Tensor]
    block: int


_Range = tuple[Tensor, Tensor]
"""The least and the greatest value in each block, ``(B, H, n / block, m / block)``."""


def find_lists(keeps: Boolean, pairs: Pairs) -> BlockLists:
    """The blocks of a mask, as ``flex_attention`` takes them."""
    return BlockLists(*ops.LIST_BLOCKS(*find_blocks(keeps, pairs)))


def find_blocks(keeps: Boolean, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Whether all pairs of a block count, and whether any may, by block."""
    must, may = _decide(keeps, pairs)
    size = torch.broadcast_shapes(must.shape, _sizes(pairs))
    return must.expand(size), may.expand(size)


# ---- tables --------------------------------------------------------------------------


def find_tables(keeps: Boolean) -> list[str]:
    """The names of the tables that a predicate reads."""
    return sorted({e.func.__name__ for e in keeps.atoms(AppliedUndef) if is_table(e)})


def spell_tables(keeps: Boolean, number: int) -> Boolean:
    """The same predicate, its tables read as captures from ``number`` on.

    Args:
        keeps: a predicate; it asks of tables only whether blocks are on.
        number: of the first of ``find_tables``; the others follow.
    """
    numbers = {name: n for n, name in enumerate(find_tables(keeps), number)}
    spelled = dict[sympy.Basic, sympy.Basic]()
    for p in keeps.atoms(sympy.Eq, sympy.Ne):
        e = p.lhs - p.rhs
        if is_table(e):
            is_on = _spell_table(e, numbers[e.func.__name__])
            spelled[p] = is_on if isinstance(p, sympy.Ne) else negate(is_on)
    found: Boolean = keeps.xreplace(spelled)
    assert not find_tables(found), f"a table is read otherwise in {keeps}"
    return found


def _spell_table(e: sympy.Basic, number: int) -> Boolean:
    """Whether the block that a table is read at is on."""
    table, (h, i, j) = parse_table(e.func.__name__), e.args
    if isinstance(table, RandomBlocks):  # their values are those picked for each row
        picked: Iterable[sympy.Expr] = (
            capture(number, h, i, sympy.Integer(n)) for n in range(table.count)
        )
        return disjunction(*(equals_zero(one - j) for one in picked))
    head = h if table.shape[0] > 1 else sympy.Integer(0)
    return negate(equals_zero(capture(number, head, i, j)))


@dataclass(frozen=True, slots=True)
class Readings:
    """A predicate on rows and columns instead of positions.

    Attributes:
        keeps: the predicate.
        captures: what it reads.
        is_within: whether no index it reads at is past an end.
    """

    keeps: Boolean
    captures: tuple[Tensor, ...]
    is_within: bool


def read_ahead(keeps: Boolean, pairs: Pairs) -> Readings:
    """Read here, once for each row, what hangs on queries or on keys alone.

    A kernel has one load for it then, and nothing to check.
    """
    values = list[Tensor]()
    done = dict[sympy.Basic, sympy.Basic]()

    def load(e: sympy.Basic) -> sympy.Expr:
        value = evaluate_value(e, pairs.at, pairs.captures)
        value = value[(None,) * (4 - value.dim())]
        for dim, symbol in reversed(list(enumerate((B, H, Q, K)))):
            if symbol not in e.free_symbols:
                value = value.select(dim, 0)
        values.append(value.contiguous())
        symbols = [x for x in (B, H, Q, K) if x in e.free_symbols]
        return capture(len(values) - 1, *symbols)

    def rewrite(e: sympy.Basic) -> sympy.Basic:
        if e not in done:
            done[e] = rewrite_new(e)
        return done[e]

    def rewrite_new(e: sympy.Basic) -> sympy.Basic:
        is_read = is_capture(e)
        if e in {Q, K} or (is_read and not _reads_pairs(e)):
            return load(e)
        args = [rewrite(arg) for arg in e.args]
        if not is_read:
            return e.func(*args) if args else e
        kind, number = e.func.__name__[0], int(e.func.__name__[1:])
        values.append(pairs.captures[number])
        name = f"{kind}{len(values) - 1}"
        return sympy.Function(name, integer=True)(*args)

    is_within = not any(
        is_capture(e) and _reads_pairs(e) for e in keeps.atoms(AppliedUndef)
    )
    keeps = rewrite(keeps)
    return Readings(keeps, tuple(map(ops.STORE, values)), is_within)


ops.LIBRARY.impl("store", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("ringcompile::store", torch.clone, lib=ops.LIBRARY)


def _reads_pairs(e: sympy.Basic) -> bool:
    return {Q, K} <= e.free_symbols or not e.free_symbols


def _sizes(pairs: Pairs) -> tuple[int, int, int, int]:
    """Of tensors of blocks, dims of batch and heads being 1."""
    n, m = pairs.at[2].shape[_ROWS], pairs.at[3].shape[_COLUMNS]
    return (
        1,
        1,
        (n + pairs.block - 1) // pairs.block,
        (m + pairs.block - 1) // pairs.block,
    )


def _list(are_on: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row are on, and which; behind those the others."""
    counts = are_on.sum(-1, dtype=torch.int32)
    order = are_on.to(torch.int8).argsort(stable=True, dim=-1, descending=True)
    return counts, order.to(torch.int32).contiguous()


def list_blocks(must: Tensor, may: Tensor) -> list[Tensor]:
    """Of blocks in which some pairs count, then of full ones: by row, then by column.

    ``ops.LIST_BLOCKS``: kernels of torch, as of two equal sizes that are symbols
    Inductor makes no code.
    """
    some = may & ~must
    return [x for t in (some, must, some.mT, must.mT) for x in _list(t)]


def _list_shapes(must: Tensor, _may: Tensor) -> list[Tensor]:
    batch, heads, n, m = must.shape
    shapes = [(batch, heads, n), (batch, heads, n, m)] * 2
    shapes += [(batch, heads, m), (batch, heads, m, n)] * 2
    return [must.new_empty(shape, dtype=torch.int32) for shape in shapes]


ops.LIBRARY.impl("list_blocks", list_blocks, "CompositeExplicitAutograd")
torch.library.register_fake("ringcompile::list_blocks", _list_shapes, lib=ops.LIBRARY)


# ---- predicates: whether all pairs of a block count, and whether any may -------------


def _decide(p: Boolean, pairs: Pairs) -> _Range:
    exact = _find_exact(p, pairs)
    if exact is not None:
        return exact[0].bool(), exact[1].bool()
    if isinstance(p, (sympy.And, sympy.Or)):
        join = torch.logical_and if isinstance(p, sympy.And) else torch.logical_or
        must, may = _decide(p.args[0], pairs)
        for arg in p.args[1:]:
            other = _decide(arg, pairs)
            must, may = join(must, other[0]), join(may, other[1])
        return must, may
    assert isinstance(p, (sympy.Ge, sympy.Eq, sympy.Ne)), f"a predicate {p}"
    if isinstance(p, sympy.Ge):
        low, high = _find_range(p.lhs - p.rhs, pairs)
        return low >= 0, ~(high < 0)
    is_zero, may_be_zero = _compare(p.lhs - p.rhs, pairs)
    if isinstance(p, sympy.Eq):
        return is_zero, may_be_zero
    return ~may_be_zero, ~is_zero


def _compare(e: sympy.Expr, pairs: Pairs) -> _Range:
    """Whether a sum is 0 in all of a block, and whether it may be in some.

    What queries give is compared with what keys give: their difference may not fit.
    """
    of_keys = [t for t in sympy.Add.make_args(e) if K in t.free_symbols]
    keys = -sympy.Add(*of_keys)
    q, k = (_find_exact(x, pairs) for x in (e + keys, keys))
    if q is None or k is None:
        low, high = _find_range(e, pairs)
        return (low == 0) & (high == 0), ~((low > 0) | (high < 0))
    are_one = (q[0] == q[1]) & (k[0] == k[1]) & (q[0] == k[0])
    return are_one, ~((q[0] > k[1]) | (q[1] < k[0]))


# ---- sums: their ranges, float64; what has no bound is infinite ----------------------


_MOST = 2.0**40
"""Numbers beyond it have no bounds: sums of those below are exact."""


def _find_range(e: sympy.Expr, pairs: Pairs) -> _Range:
    exact = _find_exact(e, pairs)
    if exact is not None:
        return _bound(*(x.double() for x in exact))
    if isinstance(e, sympy.Add):
        ranges = [_find_range(arg, pairs) for arg in e.args]
        low, high = (reduce(torch.add, ends) for ends in zip(*ranges, strict=True))
        return _bound(low, high)
    if isinstance(e, (sympy.floor, sympy.Mod)):
        return _find_quotient(e, pairs)
    if isinstance(e, sympy.Mul) and e.args[0].is_Integer:
        factor, rest = e.as_two_terms()
        low, high = (float(factor) * x for x in _find_range(rest, pairs))
        return _bound(low, high) if factor >= 0 else _bound(high, low)
    far = pairs.at[3].new_full((1, 1, 1, 1), torch.inf, dtype=torch.float64)
    found = [_find_exact(arg, pairs) for arg in e.args] if is_capture(e) else [None]
    ranges = [x for x in found if x is not None]
    if len(ranges) < len(found):
        return -far, far
    # Read at what all of a block's pairs read; where that is not one place, anything.
    is_one = reduce(torch.logical_and, (low == high for low, high in ranges))
    value = read_capture(e, [low for low, _ in ranges], pairs.captures).double()
    return _bound(*(torch.where(is_one, value, end) for end in (-far, far)))


def _bound(low: Tensor, high: Tensor) -> _Range:
    return (
        torch.where(low.abs() <= _MOST, low, -torch.inf),
        torch.where(high.abs() <= _MOST, high, torch.inf),
    )


def _find_quotient(e: sympy.Expr, pairs: Pairs) -> _Range:
    """Of ``floor(x / n)`` or of ``x mod n``."""
    x, n = split_floor(e) if isinstance(e, sympy.floor) else (e.args[0], int(e.args[1]))
    low, high = _find_range(x, pairs)
    first, last = (torch.div(end, n, rounding_mode="floor") for end in (low, high))
    if isinstance(e, sympy.floor):
        return _bound(first, last)
    is_one = first == last
    return (
        torch.where(is_one, low - n * first, 0.0),
        torch.where(is_one, high - n * last, n - 1.0),
    )


def _find_exact(e: sympy.Basic, pairs: Pairs) -> _Range | None:
    """Of what reads queries or keys alone, row by row; None: it reads both."""
    symbols = e.free_symbols
    if {Q, K} <= symbols:
        return None
    value = evaluate_value(e, pairs.at, pairs.captures).to(torch.int64)
    value = value[(None,) * (4 - value.dim())]
    for symbol, dim in ((Q, _ROWS), (K, _COLUMNS)):
        if symbol in symbols:
            return _reduce(value, dim, pairs.block, torch.amin), _reduce(
                value, dim, pairs.block, torch.amax
            )
    return value, value


def _reduce(
    x: Tensor, dim: int, block: int, over: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Over blocks of a dim; the last one is filled up with its last row."""
    size = x.shape[dim]
    count = (size + block - 1) // block
    rows = torch.arange(count * block, device=x.device).clamp(max=size - 1)
    return over(x.index_select(dim, rows).unflatten(dim, (count, block)), dim + 1)
