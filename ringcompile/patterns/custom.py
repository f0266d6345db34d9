"""A user's own mask: a function of positions, or a table of blocks."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile.errors import OptionError
from ringcompile.ir.mask import (
    FALSE,
    TRUE,
    B,
    H,
    K,
    Q,
    at_least_zero,
    canonicalize,
    conjunction,
    disjunction,
    equals_zero,
    negate,
)
from ringcompile.ir.tables import GivenBlocks, is_on
from ringcompile.patterns.base import AttentionSpec, MaskPattern, require_positive

MaskMod = Callable[..., object]


@dataclass(frozen=True, slots=True, init=False)
class Custom(MaskPattern):
    """The pairs that a user's function or table of blocks keeps.

    Attributes:
        mask_mod: ``mask_mod(b, h, q, k)``, as of ``flex_attention``: true where the
            pair counts. It is called once, on symbols, so that it may use ``+ - * //
            %``, comparisons, ``& | ~`` and whole numbers. None with a table.
        table: the blocks that are on; None with a function.
        block: tokens in a block of the table.
    """

    mask_mod: MaskMod | None
    table: GivenBlocks | None
    block: int = field(default=64)

    def __init__(self, keeps: MaskMod | Tensor, block: int = 64) -> None:
        """Take a function, or a bool tensor ``(nb, nb)`` or ``(H, nb, nb)`` of blocks.

        ``nb = ceil(S / block)``. A function should be defined in a module: one that is
        made anew compiles anew.
        """
        require_positive("Custom", block=block)
        table, function = None, None
        if isinstance(keeps, Tensor):
            table = _read_table(keeps)
        else:
            _check_function(keeps)
            function = keeps
        for name, value in (("mask_mod", function), ("table", table), ("block", block)):
            object.__setattr__(self, name, value)

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """As given."""
        if self.table is None:
            assert self.mask_mod is not None, "a function or a table"
            return _read_function(self.mask_mod)
        heads, rows, columns = self.table.shape
        num_blocks = -(-int(spec.length) // self.block)
        if rows != num_blocks or columns != num_blocks:
            raise OptionError(
                f"a table of {rows} x {columns} blocks",
                at="Custom",
                because=f"{int(spec.length)} tokens are {num_blocks} blocks of"
                f" {self.block}",
                instead=f"a table of {num_blocks} x {num_blocks}, or another block",
            )
        if heads not in {1, spec.num_heads}:
            raise OptionError(
                f"a table for {heads} heads",
                at="Custom",
                because=f"the attention has {spec.num_heads} query heads",
                instead=f"a table for {spec.num_heads} heads, or one for all",
            )
        i, j = sympy.floor(Q / self.block), sympy.floor(K / self.block)
        return is_on(self.table, sympy.Integer(0) if heads == 1 else H, i, j)


def _read_table(on: Tensor) -> GivenBlocks:
    if on.dtype is not torch.bool or on.dim() not in {2, 3}:
        raise OptionError(
            f"a table of {on.dtype} {tuple(on.shape)}",
            at="Custom",
            because="it says of each block whether it is on",
            instead="a bool tensor (nb, nb), or (H, nb, nb) with one table a head",
        )
    return GivenBlocks.of(on.view(-1, *on.shape[-2:]))


def _check_function(function: object) -> None:
    if not callable(function):
        raise OptionError(
            repr(function),
            at="Custom",
            because="it is neither a function of positions nor a tensor of blocks",
            instead="mask_mod(b, h, q, k), or a bool tensor (nb, nb)",
        )
    if "<" in getattr(function, "__qualname__", ""):
        warnings.warn(
            "Custom holds a lambda or a local function: each new one compiles anew;"
            " define it in a module",
            stacklevel=3,
        )


def _read_function(function: MaskMod) -> Boolean:
    """The predicate that a function computes, by calling it on symbols."""
    try:
        kept = function(*(Expression(x) for x in (B, H, Q, K)))
    except (TypeError, ValueError, AttributeError) as error:
        raise _unreadable(function, str(error)) from error
    if isinstance(kept, Predicate):
        return kept.predicate
    if isinstance(kept, bool):
        return TRUE if kept else FALSE
    raise _unreadable(function, f"it gave a {type(kept).__name__}")


def _unreadable(function: MaskMod, because: str) -> OptionError:
    file = inspect.getsourcefile(function) if inspect.isroutine(function) else None
    name = getattr(function, "__qualname__", repr(function))
    return OptionError(
        f"mask function {name}",
        at=file.rpartition("/")[2] if file else "Custom",
        because=because,
        instead="+ - * // % and comparisons of b, h, q, k, joined by & | ~; or a bool"
        " tensor of blocks",
    )


@dataclass(frozen=True, slots=True, eq=False)
class Expression:
    """An integer expression of positions, as a mask function sees them."""

    value: sympy.Expr

    def __add__(self, other: object) -> "Expression":
        return Expression(self.value + _value(other))

    def __radd__(self, other: object) -> "Expression":
        return self + other

    def __sub__(self, other: object) -> "Expression":
        return Expression(self.value - _value(other))

    def __rsub__(self, other: object) -> "Expression":
        return Expression(_value(other) - self.value)

    def __neg__(self) -> "Expression":
        return Expression(-self.value)

    def __abs__(self) -> "Expression":
        return Expression(sympy.Abs(self.value))

    def abs(self) -> "Expression":
        """As of a tensor."""
        return abs(self)

    def __mul__(self, other: object) -> "Expression":
        return Expression(self.value * _number(other))

    def __rmul__(self, other: object) -> "Expression":
        return self * other

    def __floordiv__(self, other: object) -> "Expression":
        return Expression(sympy.floor(self.value / _number(other, least=1)))

    def __mod__(self, other: object) -> "Expression":
        return Expression(sympy.Mod(self.value, _number(other, least=1)))

    def __ge__(self, other: object) -> "Predicate":
        return Predicate(at_least_zero(self.value - _value(other)))

    def __le__(self, other: object) -> "Predicate":
        return Predicate(at_least_zero(_value(other) - self.value))

    def __gt__(self, other: object) -> "Predicate":
        return ~(self <= other)

    def __lt__(self, other: object) -> "Predicate":
        return ~(self >= other)

    def __eq__(self, other: object) -> "Predicate":  # type: ignore[override]
        return Predicate(equals_zero(self.value - _value(other)))

    def __ne__(self, other: object) -> "Predicate":  # type: ignore[override]
        return ~(self == other)

    def __hash__(self) -> int:
        return hash(self.value)

    def __bool__(self) -> bool:
        raise TypeError(_NO_BOOL)


@dataclass(frozen=True, slots=True)
class Predicate:
    """What a mask function makes by comparing positions."""

    predicate: Boolean

    def __and__(self, other: object) -> "Predicate":
        return Predicate(conjunction(self.predicate, _predicate(other)))

    def __rand__(self, other: object) -> "Predicate":
        return self & other

    def __or__(self, other: object) -> "Predicate":
        return Predicate(disjunction(self.predicate, _predicate(other)))

    def __ror__(self, other: object) -> "Predicate":
        return self | other

    def __xor__(self, other: object) -> "Predicate":
        return (self | other) & ~(self & other)

    def __invert__(self) -> "Predicate":
        return Predicate(canonicalize(negate(self.predicate)))

    def __bool__(self) -> bool:
        raise TypeError(_NO_BOOL)


_NO_BOOL = "`and`, `or`, `not`, `if` and chains like a < b < c need one known value"


def _value(x: object) -> sympy.Expr:
    return x.value if isinstance(x, Expression) else _number(x)


def _number(x: object, *, least: int | None = None) -> sympy.Integer:
    if isinstance(x, bool) or not isinstance(x, int):
        msg = f"{x!r} where it needs a whole number"
        raise TypeError(msg)
    if least is not None and x < least:
        msg = f"a division by {x}"
        raise ValueError(msg)
    return sympy.Integer(x)


def _predicate(x: object) -> Boolean:
    if isinstance(x, Predicate):
        return x.predicate
    if isinstance(x, bool):
        return TRUE if x else FALSE
    msg = f"{x!r} where it needs a comparison"
    raise TypeError(msg)
