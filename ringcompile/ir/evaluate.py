"""Values of predicates: on tensors of positions, the tables of blocks included.

Invariant: nothing here draws from torch's RNG.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile.ir.mask import FALSE, TABLE_MARK, TRUE, B, H, K, Q
from ringcompile.ir.sums import split_floor
from ringcompile.ir.tables import RandomBlocks, parse_table
from ringcompile.ir.text import parse_sexpr

_Value = Tensor | int | bool
_OPERATORS: dict[type, Callable[[_Value, _Value], _Value]] = {
    sympy.Add: lambda x, y: x + y,
    sympy.Mul: lambda x, y: x * y,
    sympy.Mod: lambda x, y: x % y,
    sympy.And: lambda x, y: x & y,
    sympy.Or: lambda x, y: x | y,
    sympy.Ge: lambda x, y: x >= y,
    sympy.Eq: lambda x, y: x == y,
    sympy.Ne: lambda x, y: x != y,
}


def evaluate(
    p: Boolean,
    at: Sequence[Tensor],
    captures: Sequence[Tensor] = (),
    *,
    is_within: bool = False,
) -> Tensor:
    """Evaluate a predicate on tensors of positions.

    Args:
        p: the predicate.
        at: int64 tensors ``(b, h, q, k)`` that broadcast against each other.
        captures: the capture tensors, indexed by the predicate's own expressions. An
            index past an end reads the end: the value at a pad, which is never a key
            and whose own row nobody reads, does not matter.
        is_within: whether no index is past an end.

    Returns:
        bool tensor of the broadcast shape (or broadcastable to it).
    """
    return evaluate_value(p, at, captures, is_within=is_within).bool()


def evaluate_value(
    e: sympy.Basic,
    at: Sequence[Tensor],
    captures: Sequence[Tensor] = (),
    *,
    is_within: bool = False,
) -> Tensor:
    """Evaluate what predicates are made of; arguments as of ``evaluate``."""
    values = dict(zip((B, H, Q, K), at, strict=True))
    result = _evaluate(e, values, _Reads(captures, is_within))
    if isinstance(result, Tensor):
        return result
    dtype = torch.bool if isinstance(result, bool) else torch.int64
    return at[3].new_full((), result, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Reads:
    captures: Sequence[Tensor]
    is_within: bool


def _evaluate(
    e: sympy.Basic, values: dict[sympy.Symbol, Tensor], reads: _Reads
) -> _Value:
    if isinstance(e, sympy.Symbol):
        return values[e]
    if isinstance(e, sympy.Integer):
        return int(e)
    if e in {TRUE, FALSE}:
        return bool(e)
    if isinstance(e, sympy.floor):
        x, n = split_floor(e)
        return _evaluate(x, values, reads) // n
    args = [_evaluate(a, values, reads) for a in e.args]
    if isinstance(e, AppliedUndef):
        return _read(e.func.__name__, args, reads)
    return reduce(_OPERATORS[e.func], args)


def read_capture(
    e: sympy.Basic, at: Sequence[Tensor], captures: Sequence[Tensor]
) -> Tensor:
    """What the capture of an expression holds at indices that broadcast."""
    return _read(e.func.__name__, at, _Reads(captures, is_within=False))


def _read(name: str, at: Sequence[_Value], reads: _Reads) -> Tensor:
    if TABLE_MARK in name:
        return _read_table(name, at)
    values = reads.captures[int(name[1:])]
    index = tuple(at)
    if not reads.is_within:
        index = tuple(
            i.clamp(0, size - 1) if isinstance(i, Tensor) else i
            for i, size in zip(at, values.shape, strict=True)
        )
    if name.startswith("m"):
        return _is_listed(values[index[:-1]], at[-1], values.shape[-2])
    return values[index]


def _is_listed(lists: Tensor, x: _Value, limit: int) -> Tensor:
    """Whether ``x < limit`` is in lists ``(..., 1, n)``, shared by its last dim."""
    assert isinstance(x, Tensor), "which number depends on the key"
    # -1, for none, is kept apart behind all numbers.
    shape = (*lists.shape[:-2], limit + 1)
    has = lists.new_zeros(shape).scatter(-1, lists[..., 0, :] % (limit + 1), 1)
    x = x.clamp(0, limit - 1)
    return has.gather(-1, x.expand(*has.shape[:-1], x.shape[-1]))


# Tables.

_ROWS_AT_ONCE = 256
_CPU = torch.device("cpu")


def find_extremes(name: str, rows: range, columns: range) -> tuple[bool, bool]:
    """Whether all and whether any blocks of a box are on, over all heads."""
    values = table_values(name, _CPU)[:, rows.start : rows.stop]
    if isinstance(parse_table(name), RandomBlocks):
        within = (values >= columns.start) & (values < columns.stop)
        counts = within.sum(-1)
        return bool((counts == len(columns)).all()), bool(counts.any())
    box = values[..., columns.start : columns.stop]
    return bool(box.all()), bool(box.any())


def _read_table(name: str, at: Sequence[_Value]) -> Tensor:
    """1 where blocks are on; numbers past an end read the end, as captures do."""
    device = next(x.device for x in at if isinstance(x, Tensor))
    h, i, j = (torch.as_tensor(x, device=device) for x in at)
    values = table_values(name, device)
    h, i = h.clamp(max=values.shape[0] - 1), i.clamp(max=values.shape[1] - 1)
    if isinstance(parse_table(name), RandomBlocks):
        return (values[h, i] == j[..., None]).any(-1).long()
    return values[h, i, j.clamp(max=values.shape[2] - 1)].long()


@lru_cache(maxsize=64)
def table_values(name: str, device: torch.device = _CPU) -> Tensor:
    """Flags ``(heads or 1, nb, nb)``; of random blocks, those picked ``(H, nb, n)``."""
    return _make_table(name).to(device)


@lru_cache(maxsize=64)
def _make_table(name: str) -> Tensor:
    recipe = parse_table(name)
    if isinstance(recipe, RandomBlocks):
        return _pick_blocks(recipe)
    return torch.tensor(recipe.flags).view(recipe.shape)


def _pick_blocks(recipe: RandomBlocks) -> Tensor:
    """The blocks that each row takes, ``(H, nb, count)`` int64; -1 for none."""
    taken = parse_sexpr(recipe.taken)
    h = torch.arange(recipe.num_heads).view(-1, 1, 1)
    j = torch.arange(recipe.num_blocks)
    rows = []
    for start in range(0, recipe.num_blocks, _ROWS_AT_ONCE):
        i = torch.arange(start, min(start + _ROWS_AT_ONCE, recipe.num_blocks))[:, None]
        is_open = ~evaluate(taken, (j[:1], h, i, j))
        if recipe.is_causal:
            is_open = is_open & (j <= i)
        # Signed order after the flip is the unsigned order of the hashes, of which no
        # two are equal.
        order = splitmix64(recipe.seed ^ h << 42 ^ i << 21 ^ j) ^ _SIGN_BIT
        order = order.where(is_open, torch.iinfo(torch.int64).max)
        count = min(recipe.count, recipe.num_blocks)
        picked = order.topk(count, dim=-1, largest=False).indices
        is_open = is_open.expand_as(order).gather(-1, picked)
        rows.append(picked.where(is_open, -1))
    return torch.cat(rows, 1)


_SIGN_BIT = -(1 << 63)


def splitmix64(x: Tensor) -> Tensor:
    """The generator's output in state ``x``, int64 as if unsigned, elementwise.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    OOPSLA 2014.
    """
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shift_right(x, 31)


def _signed(n: int) -> int:
    return n - (1 << 64) if n >> 63 else n


def shift_right(x: Tensor, by: int) -> Tensor:
    """``x`` shifted right, zeros moving in."""
    return (x >> by) & ((1 << (64 - by)) - 1)
