"""Index maps of views: which element of the input an element of the result is.

A rule gives, for each dim of the input, an expression in the indices of the result.
They hold for tensors of any dtype, so they also prove what a repeat of K repeats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Expr
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.fx import Node

from ringcompile.passes.op import Op
from ringcompile.passes.symbolic import (
    Size,
    Unreadable,
    Value,
    index_symbol,
)
from ringcompile.torch_private import size_expression, sizes_equal

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Call:
    """A call being read.

    Attributes:
        op: the call with its arguments by name.
        read: reads the value of a tensor node.
        is_mutated: whether a node's memory is written to; views alone need not know.
    """

    op: Op
    read: Callable[[Node], Value]
    is_mutated: Callable[[Node], bool] = lambda _: False

    @property
    def shape(self) -> tuple[Size, ...]:
        """Shape of the result."""
        return tuple(self._val.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the result."""
        return self._val.dtype

    @property
    def _val(self) -> Tensor:
        value = self.op.node.meta["val"]
        assert isinstance(value, Tensor), "only calls that give one tensor are read"
        return value

    def tensor(self, name: str) -> Value:
        """The value of a tensor argument."""
        argument = self.op.args.get(name)
        if not isinstance(argument, Node):
            raise Unreadable(f"{self.op.node.target} isn't known")
        return self.read(argument)

    def integer(self, name: str) -> Expr:
        """An integer argument, possibly symbolic."""
        return read_integer(self.op.args[name])

    def static_integer(self, name: str) -> int:
        """An integer argument that must be known."""
        value = self.integer(name)
        if not value.is_Integer:
            raise Unreadable(f"{name} of {self.op.packet} is symbolic")
        return int(value)


def read_integer(argument: Any) -> Expr:  # noqa: ANN401
    """An integer, SymInt, or node of one as an expression."""
    if isinstance(argument, Node):
        argument = argument.meta.get("val")
    if isinstance(argument, (int, torch.SymInt)):
        return size_expression(argument)
    raise Unreadable("an argument isn't an integer known when compiling")


def indices(ndim: int, start: int = 0) -> list[Expr]:
    """The index symbols of ``ndim`` dims from ``start`` on."""
    return [index_symbol(start + d) for d in range(ndim)]


# ---- rules ---------------------------------------------------------------------------

IndexMap = Callable[[Call, Value], list[Expr]]


def _identity(call: Call, x: Value) -> list[Expr]:
    return indices(len(x.shape))


def _expand(call: Call, x: Value) -> list[Expr]:
    return indices(len(x.shape), start=len(call.shape) - len(x.shape))


def _transpose(call: Call, x: Value) -> list[Expr]:
    index = indices(len(x.shape))
    a, b = call.op.args["dim0"], call.op.args["dim1"]
    index[a], index[b] = index[b], index[a]
    return index


def _swap_last(call: Call, x: Value) -> list[Expr]:
    index = indices(len(x.shape))
    return [*index[:-2], *index[:-3:-1]]


def _reverse(call: Call, x: Value) -> list[Expr]:
    return indices(len(x.shape))[::-1]


def _permute(call: Call, x: Value) -> list[Expr]:
    ndim = len(x.shape)
    index = indices(ndim)
    for result_dim, dim in enumerate(call.op.args["dims"]):
        index[dim % ndim] = index_symbol(result_dim)
    return index


def _select(call: Call, x: Value) -> list[Expr]:
    dim = call.op.args["dim"] % len(x.shape)
    at = _from_start(call.integer("index"), x.shape[dim])
    index = indices(len(x.shape) - 1)
    return [*index[:dim], at, *index[dim:]]


def _slice(call: Call, x: Value) -> list[Expr]:
    dim = call.op.args["dim"] % len(x.shape)
    step = call.static_integer("step")
    start = sympy.S.Zero
    if call.op.args["start"] is not None:
        start = _from_start(call.integer("start"), x.shape[dim], clamp=True)
    index = indices(len(x.shape))
    index[dim] = start + step * index[dim]
    return index


def _from_start(position: Expr, size: Size, *, clamp: bool = False) -> Expr:
    """A position as Python means it: negative counts from the end."""
    if position.is_negative:
        position = position + read_integer(size)
        if clamp and position.is_negative:
            return sympy.S.Zero
    if not position.is_nonnegative:
        raise Unreadable(f"whether position {position} counts from the end is unknown")
    return position


def _repeat_interleave(call: Call, x: Value) -> list[Expr]:
    if call.op.args.get("dim") is None:
        raise Unreadable("repeat_interleave over a flattened tensor")
    index = indices(len(x.shape))
    dim = call.op.args["dim"] % len(x.shape)
    index[dim] = sympy.floor(index[dim] / call.integer("repeats"))
    return index


def _repeat(call: Call, x: Value) -> list[Expr]:
    first = len(call.shape) - len(x.shape)
    return [
        i if sizes_equal(size, repeated) else sympy.Mod(i, read_integer(size))
        for i, size, repeated in zip(
            _expand(call, x), x.shape, call.shape[first:], strict=True
        )
    ]


def _flip(call: Call, x: Value) -> list[Expr]:
    ndim = len(x.shape)
    index = indices(ndim)
    for dim in call.op.args["dims"]:
        index[dim % ndim] = read_integer(x.shape[dim]) - 1 - index[dim % ndim]
    return index


def _reshape(call: Call, x: Value) -> list[Expr]:
    return map_reshape(x.shape, call.shape)


def map_reshape(old: Sequence[Size], new: Sequence[Size]) -> list[Expr]:
    """Index into the old shape of each element of the new shape, in row-major order."""
    index: list[Expr] = [sympy.S.Zero] * len(old)
    for old_dims, new_dims in _match_dims(old, new):
        if len(old_dims) == len(new_dims) == 1:
            index[old_dims[0]] = index_symbol(new_dims[0])
            continue
        place = _flatten(new_dims, new)
        stride: Expr = sympy.S.One
        for dim in reversed(old_dims):
            if not stride.is_Integer:
                raise Unreadable(f"a reshape by the unknown size {stride}")
            at = sympy.floor(place / stride)
            size = read_integer(old[dim])
            index[dim] = at if dim == old_dims[0] else _remainder(at, size)
            stride = stride * size
    return index


def _remainder(x: Expr, size: Expr) -> Expr:
    if not size.is_Integer:
        raise Unreadable(f"a reshape by the unknown size {size}")
    return sympy.Mod(x, size)


def _flatten(dims: Sequence[int], shape: Sequence[Size]) -> Expr:
    place: Expr = sympy.S.Zero
    for dim in dims:
        place = place * read_integer(shape[dim]) + index_symbol(dim)
    return place


def _match_dims(
    old: Sequence[Size], new: Sequence[Size]
) -> list[tuple[list[int], list[int]]]:
    """Pair the shortest runs of dims, size 1 left out, that have equal products."""
    rest_old = [d for d, size in enumerate(old) if not sizes_equal(size, 1)]
    rest_new = [d for d, size in enumerate(new) if not sizes_equal(size, 1)]
    pairs = []
    while rest_old and rest_new:
        a, b = [rest_old.pop(0)], [rest_new.pop(0)]
        size_a, size_b = read_integer(old[a[0]]), read_integer(new[b[0]])
        while size_a != size_b:
            grow_old = _is_multiple(size_b, size_a)
            rest = rest_old if grow_old else rest_new
            if not rest:
                raise Unreadable(f"a reshape from {list(old)} to {list(new)}")
            dim = rest.pop(0)
            if grow_old:
                a.append(dim)
                size_a = sympy.expand(size_a * read_integer(old[dim]))
            else:
                b.append(dim)
                size_b = sympy.expand(size_b * read_integer(new[dim]))
        pairs.append((a, b))
    if rest_old or rest_new:
        raise Unreadable(f"a reshape from {list(old)} to {list(new)}")
    return pairs


def _is_multiple(size: Expr, of: Expr) -> bool:
    """Whether ``size`` still has to be reached from ``of`` by adding dims."""
    if size.is_Integer and of.is_Integer:
        return bool(size > of)
    return not sympy.fraction(sympy.cancel(size / of))[1].free_symbols


VIEWS: dict[OpOverloadPacket, IndexMap] = {
    aten.alias: _identity,
    aten.clone: _identity,
    aten.contiguous: _identity,
    aten.detach: _identity,
    aten.detach_: _identity,
    aten.lift_fresh: _identity,
    aten.lift_fresh_copy: _identity,
    aten.expand: _expand,
    aten.expand_as: _expand,
    aten.broadcast_to: _expand,
    aten.transpose: _transpose,
    aten.t: _swap_last,
    aten.mT: _swap_last,
    aten.numpy_T: _reverse,
    aten.permute: _permute,
    aten.select: _select,
    aten.slice: _slice,
    aten.repeat_interleave: _repeat_interleave,
    aten.repeat: _repeat,
    aten.flip: _flip,
    aten.view: _reshape,
    aten.view_as: _reshape,
    aten.reshape: _reshape,
    aten.reshape_as: _reshape,
    aten._unsafe_view: _reshape,  # noqa: SLF001
    aten.flatten: _reshape,
    aten.unflatten: _reshape,
    aten.unsqueeze: _reshape,
    aten.squeeze: _reshape,
}
