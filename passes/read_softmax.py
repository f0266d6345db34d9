"""Read a softmax in any spelling: one op, exp over its sum, exp of a difference."""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from sympy import Expr
from torch.fx import Node

from ringcompile.ir.mask import EmptyRow
from ringcompile.ir.sums import canonical_sum
from ringcompile.passes.coordinates import align, read_index_map, settle
from ringcompile.passes.op import Op, is_float, is_tensor, read_op, shape_of
from ringcompile.passes.operands import NOT_FOLLOWED
from ringcompile.passes.symbolic import Size, index_symbol
from ringcompile.passes.value_scalars import holds_tensor
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten

_SAFE = aten._safe_softmax  # noqa: SLF001
_SOFTMAXES = {aten.softmax, aten._softmax, _SAFE}  # noqa: SLF001
_LOG_SOFTMAXES = {aten.log_softmax, aten._log_softmax}  # noqa: SLF001
_PAIR = 2
KEY = sympy.Symbol("key", integer=True, nonnegative=True)  # the key that an exp is of


@dataclass(frozen=True, slots=True)
class Softmax:
    """A softmax in any spelling.

    Attributes:
        weights: the node of its result.
        scores: what it is taken of.
        dim: the dim it is taken over.
        infinite: what a row of -inf alone gives; None: it is left to chance.
        inside: the nodes that it is spelled by, if by several.
        masked: the op that puts zeros beside exps before they are summed, if one does,
            and which of its slots holds the exps.
        sink: the score of one more key, whose value is 0; None if there is none.
    """

    weights: Node
    scores: Node
    dim: int
    infinite: EmptyRow | None = EmptyRow.NAN
    inside: tuple[Node, ...] = ()
    masked: tuple[Op, Node] | None = None
    sink: float | None = None


def read_softmax(node: Node) -> Softmax | None:
    """The softmax whose result a node is; None if it is none."""
    op = read_op(node)
    if op is None or not is_tensor(node):
        return None
    if op.packet in _SOFTMAXES:
        infinite = EmptyRow.ZERO if op.packet is _SAFE else EmptyRow.NAN
        dim = op.args["dim"] % max(len(shape_of(node)), 1)
        return Softmax(node, op.slots[0], dim, infinite)
    if op.packet is aten.div:
        return _read_exp_over_sum(op)
    if op.packet is aten.exp:
        return _read_exp_of_log(op)
    return None


# ---- exp over its sum ----------------------------------------------------------------


def _read_exp_over_sum(op: Op) -> Softmax | None:
    """``e / e.sum(dim, keepdim=True)`` with ``e = exp(x)`` or ``exp(x - amax(x))``."""
    if len(op.slots) != _PAIR or op.args.get("rounding_mode") is not None:
        return None
    numerator, denominator = op.slots
    if not has_shape_of(op.node, numerator):
        return None
    total = read_total(denominator, numerator, shape_of(numerator))
    if total is None or not total.is_beside(numerator):
        return None
    softmax = read_exp(numerator, total.dim)
    if softmax is None:
        return None
    inside = (op.node, denominator, *total.inside, *softmax.inside)
    if total.more is not None:
        if softmax.infinite is None:  # more is then added to what was shifted
            return None
        softmax = replace(softmax, sink=math.log(total.more))
    return replace(softmax, weights=op.node, infinite=None, inside=inside)


def read_exp(node: Node, dim: int) -> Softmax | None:
    """Exps that are to be summed; ``infinite`` is None where scores were shifted."""
    op = read_op(node)
    if op is None:
        return None
    masked, inside = None, [node]
    if op.packet in (aten.mul, aten.masked_fill, aten.where):
        exps = [n for n in op.slots if _is_call(n, aten.exp)]
        if len(exps) != 1 or not has_shape_of(exps[0], node):
            return None
        masked, op = (op, exps[0]), read_op(exps[0])
        inside += exps
    if op is None or op.packet is not aten.exp:
        return None
    x = op.slots[0]
    inside.append(x)
    shift = read_op(x)
    infinite: EmptyRow | None = EmptyRow.NAN
    if shift is not None and shift.packet is aten.sub and is_own_max(shift, dim):
        x, infinite = shift.slots[0], None
    return Softmax(node, x, dim, infinite, tuple(inside), masked)


def has_shape_of(x: Node, y: Node) -> bool:
    """Whether two tensors have the same shape."""
    own, other = shape_of(x), shape_of(y)
    return len(own) == len(other) and all(map(sizes_equal, own, other))


@dataclass(frozen=True, slots=True)
class Total:
    """The sum of a tensor over one dim, moved.

    Attributes:
        dim: the dim.
        index: into the sum, its dim kept and at 0, of each element of what it is
            divided into.
        inside: nodes from the sum on.
        more: a positive number that was added to it; None if none was.
    """

    dim: int
    index: tuple[Expr, ...]
    inside: tuple[Node, ...]
    more: float | None

    def is_beside(self, node: Node) -> bool:
        """Whether each element of the tensor that was summed meets its own sum."""
        own = [
            sympy.S.Zero if d == self.dim or sizes_equal(size, 1) else index_symbol(d)
            for d, size in enumerate(shape_of(node))
        ]
        return list(self.index) == own


def read_total(node: Node, summed: Node, shape: Sequence[Size]) -> Total | None:
    """Read ``node`` as the sum of ``summed`` over a dim.

    Args:
        node: what something is divided by.
        summed: the tensor.
        shape: of what is divided.
    """
    symbols = [index_symbol(d) for d in range(len(shape))]
    sizes = known_sizes(shape)
    more, inside = None, []
    for place, index in follow_views(node, align(shape_of(node), symbols), sizes):
        inside.append(place)
        op = read_op(place)
        if op is None:
            return None
        if op.packet is aten.add and more is None:
            more = _read_more(op)
            if more is None:
                return None
            sums = read_total(op.slots[0], summed, shape_of(place))
            if sums is None or sums.more is not None:
                return None
            here = {index_symbol(d): e for d, e in enumerate(index)}
            moved = tuple(settle(e.xreplace(here), sizes) for e in sums.index)
            return Total(sums.dim, moved, (*inside, *sums.inside), more)
        if op.packet is aten.sum:
            total = _read_sum(op, summed, index, sizes)
            return total and replace(total, inside=(*inside, *total.inside))
    return None


def _read_sum(
    op: Op, summed: Node, index: Sequence[Expr], sizes: Mapping[sympy.Symbol, int]
) -> Total | None:
    """The sum of ``summed``, or of a view of it, over one dim."""
    dims, source = op.args.get("dim"), op.slots[0]
    if not isinstance(dims, list | tuple) or len(dims) != 1 or not is_float(op.node):
        return None
    over = int(dims[0]) % len(shape_of(source))
    whole = list(index)
    whole[over : over + int(op.args["keepdim"])] = [KEY]
    size = shape_of(source)[over]
    inside: list[Node] = []
    if isinstance(size, int):
        sizes = {**sizes, KEY: size}
    for node, place in follow_views(source, whole, sizes):
        if node is summed:
            return _make_total(summed, size, place, inside)
        inside.append(node)
    return None


def _make_total(
    summed: Node, size: Size, place: Sequence[Expr], inside: Sequence[Node]
) -> Total | None:
    """The sum over the dim that keys are read along, if all of it is summed."""
    dims = [d for d, e in enumerate(place) if e.has(KEY)]
    if len(dims) != 1 or place[dims[0]] != KEY:
        return None
    (dim,) = dims
    if not sizes_equal(shape_of(summed)[dim], size):
        return None
    index = [sympy.S.Zero if d == dim else e for d, e in enumerate(place)]
    return Total(dim, tuple(index), tuple(inside), None)


def _read_more(op: Op) -> float | None:
    """The positive number that a sum of two adds to a tensor."""
    number = op.args["other"]
    if len(op.slots) != 1 or holds_tensor(number) or op.args["alpha"] != 1:
        return None
    return float(number) if isinstance(number, int | float) and number > 0 else None


def known_sizes(shape: Sequence[Size]) -> dict[sympy.Symbol, int]:
    """Below which numbers the indices into a shape are."""
    return {index_symbol(d): n for d, n in enumerate(shape) if isinstance(n, int)}


def follow_views(
    node: Node, index: Sequence[Expr], sizes: Mapping[sympy.Symbol, int]
) -> Iterator[tuple[Node, Sequence[Expr]]]:
    """Each node that a tensor is a view of, itself first, and the index into it.

    Args:
        node: the tensor.
        index: into it.
        sizes: below which numbers the symbols of the index are.
    """
    while True:
        yield node, index
        op = read_op(node)
        if op is None or op.packet in NOT_FOLLOWED:
            return
        step = read_index_map(op)
        if step is None:
            return
        here = {index_symbol(d): e for d, e in enumerate(index)}
        node = op.slots[0]
        above = [settle(canonical_sum(e.xreplace(here)), sizes) for e in step]
        index = align(shape_of(node), above)


# ---- exp of a difference -------------------------------------------------------------


def _read_exp_of_log(op: Op) -> Softmax | None:
    """Exp of a log softmax, in one op or spelled out."""
    log = read_op(op.slots[0])
    if log is not None and log.packet in _LOG_SOFTMAXES:
        dim = log.args["dim"] % len(shape_of(op.node))
        return Softmax(op.node, log.slots[0], dim)
    return None if log is None else _read_exp_of_difference(op, log)


def _read_exp_of_difference(op: Op, difference: Op) -> Softmax | None:
    """``exp(x - logsumexp(x, dim, keepdim=True))``."""
    if difference.packet is not aten.sub or difference.args["alpha"] != 1:
        return None
    if len(difference.slots) != _PAIR:
        return None
    total = read_op(difference.slots[1])
    if total is None or total.packet is not aten.logsumexp:
        return None
    if total.slots[0] is not difference.slots[0] or not total.args["keepdim"]:
        return None
    dims = total.args["dim"]
    if len(dims) != 1:
        return None
    dim = int(dims[0]) % len(shape_of(op.node))
    inside = (op.node, *op.slots, *difference.slots)
    return Softmax(op.node, difference.slots[0], dim, infinite=None, inside=inside)


def is_own_max(op: Op, dim: int) -> bool:
    """Whether a difference subtracts a tensor's own maxima over ``dim``, at least."""
    if len(op.slots) != _PAIR or op.args.get("alpha", 1) != 1:
        return False
    x, highest = op.slots
    while _is_call(highest, aten.detach):
        highest = highest.all_input_nodes[0]
    shape = shape_of(highest)
    if len(shape) != len(shape_of(x)) or not sizes_equal(shape[dim], 1):
        return False
    if highest.target is operator.getitem and highest.args[1] == 0:
        source = highest.args[0]
        assert isinstance(source, Node), "an item of a result of several"
        return _is_call(source, aten.max) and source.args[0] is x
    return _is_call(highest, aten.amax) and highest.args[0] is x


def _is_call(node: Node, packet: object) -> bool:
    op = read_op(node)
    return op is not None and op.packet is packet
