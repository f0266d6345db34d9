"""Writes the rewritten graph: reshards between nodes, sizes, positions, pads.

Invariant: a reshard is written once for each value, placement and grad mode, and stands
before its first use.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from ringcompile.errors import ShardingError
from ringcompile.ir.layout import Layout
from ringcompile.ir.reshard import format_spec, parse_spec
from ringcompile.ops import GATHER, REDUCE, SCALE_GRAD, SHARD, SPREAD
from ringcompile.passes.dims import Size
from ringcompile.passes.op import (
    Op,
    call_arguments,
    is_complex,
    is_float,
    is_tensor,
    read_op,
    shape_of,
)
from ringcompile.passes.propagate_layout import (
    Placement,
    Placements,
    Shard,
    Window,
)
from ringcompile.passes.sharded_inputs import LOCAL
from ringcompile.torch_private import SET_GRAD_ENABLED, size_expression, sizes_equal

aten = torch.ops.aten

_SIZE_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
}

_SEEDS = 1 << 62

# Tags of a node that what is written for it inherits.
_INHERITED = ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id")


@dataclass(frozen=True, slots=True)
class AxisLayout:
    """How one axis is cut.

    Attributes:
        layout: which positions each rank holds.
        length: tokens S, possibly symbolic.
        padded: whether some rank holds pads.
        spec: text of the ``ReshardSpec``.
        window: where it lies, if it is a part of another axis.
        rows: rows on each rank, if that is another axis's.
    """

    layout: Layout
    length: Size
    padded: bool
    spec: str
    window: Window | None = None
    rows: Size | None = None

    @property
    def shard_size(self) -> Size:
        """Rows on each rank."""
        if self.rows is not None:
            return self.rows
        if self.padded:
            assert isinstance(self.length, int), "a padded axis has a fixed length"
            return self.layout.shard_size(self.length)
        return self.length // self.layout.cp_size


class Emitter:
    """A new graph in the making, for one rank."""

    def __init__(
        self, old: Graph, placements: Placements, axes: tuple[AxisLayout, ...]
    ) -> None:
        self.graph = Graph()
        self.env: dict[Node, Node] = {}
        self._old = old
        self._placements = placements
        self._axes = axes
        self._memo: dict[tuple[object, ...], Node] = {}
        self._spread_inputs: dict[Node, Node] = {}
        self._modes: tuple[str, ...] = ()
        self._meta: dict[str, Any] = {}
        self._name: str | None = None
        self._needs_grad = _find_grads(old)

    # ---- plain calls -----------------------------------------------------------------

    @contextmanager
    def writing_for(self, node: Node) -> Iterator[None]:
        """Everything written inside inherits the tags of the old ``node``."""
        self._meta = {k: node.meta[k] for k in _INHERITED if k in node.meta}
        yield

    def name_after(self, node: Node) -> None:
        """Let the next call be named as the old ``node``, which it stands for."""
        self._name = node.name

    def enter_mode(self, name: str) -> None:
        """Note a change of grad mode or autocast: reshards aren't shared across it."""
        self._modes = (*self._modes, name)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:  # noqa: ANN401
        """Write a call."""
        name, self._name = self._name, None
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta.update(self._meta)
        return node

    def call_op(self, op: Op, args: dict[str, Any]) -> Node:
        """Write the same op with other arguments."""
        positional, keyword = call_arguments(op.overload, args)
        return self.call(op.overload, *positional, **keyword)

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        """Cast; free where the dtype is right already."""
        return self.call(aten.to.dtype, x, dtype)

    def copy(self, node: Node, value_of: Callable[[Node], Node]) -> Node:
        """Copy an old node that is no op of a library."""
        new = self.graph.node_copy(node, value_of)
        new.meta = dict(self._meta)
        return new

    # ---- sizes and positions ---------------------------------------------------------

    def size(self, size: Size) -> int | Node:
        """A size as an int, or as a node where it is symbolic."""
        return self.expression(size_expression(size))

    def expression(self, e: sympy.Expr) -> int | Node:
        """The value of a size expression, as an int or a node."""
        if e.is_Integer:
            return int(e)
        key = ("size", e)
        if key not in self._memo:
            self._memo[key] = self._write_expression(e)
        return self._memo[key]

    def _write_expression(self, e: sympy.Expr) -> Node:
        if e.is_Symbol:
            return self._symbol(e)
        args = [self.expression(a) for a in e.args]
        target = _SIZE_OPERATORS.get(type(e).__name__)
        assert target is not None, f"size {e} can't be written into the graph"
        result = args[0]
        for arg in args[1:]:
            result = self.call(target, result, arg)
        assert isinstance(result, Node), "a symbolic size is a node"
        return result

    def _symbol(self, e: sympy.Expr) -> Node:
        for node in self._old.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == e:
                return self.env[node]
            for d, size in enumerate(value.shape if is_tensor(node) else ()):
                if size_expression(size) == e:
                    return self.call(aten.sym_size.int, self.env[node], d)
        raise AssertionError(f"no input has the size {e}")

    def note_local_size(self, node: Node) -> None:
        """Read a local length off an input that comes as a shard."""
        for dim, size in enumerate(node.meta[LOCAL].shape):
            local = size_expression(size)
            if local != size_expression(shape_of(node)[dim]):
                key = ("size", local)
                read = self.call(aten.sym_size.int, self.env[node], dim)
                self._memo.setdefault(key, read)

    def find_shard(self, node: Node) -> Shard:
        """How an input lies that comes as a shard, by its length alone."""
        for dim, own in enumerate(node.meta[LOCAL].shape):
            whole = shape_of(node)[dim]
            if size_expression(own) == size_expression(whole):
                continue
            for number, axis in enumerate(self._axes):
                if axis.window is None and sizes_equal(axis.length, whole):
                    return Shard(number, dim)
        raise ShardingError(
            f"input {node.name}, a shard that is needed whole",
            at="the inputs",
            because="no attention that can be cut has its length",
            instead='inputs="replicated"',
        )

    def positions(self, shard: Shard) -> Node:
        """Global positions of this rank's rows, int64 ``(T,)``; -1 for pads."""
        axis = self._axes[shard.axis]
        key = ("positions", shard.axis, self._modes)
        if key not in self._memo and axis.window is not None:
            self._memo[key] = self._positions_within(axis, axis.window)
        if key not in self._memo:
            every = self.call(
                aten.arange.default, self.size(axis.length), device=self._device
            )
            self._memo[key] = self.call(SHARD, every, 0, 1, 1, spec=axis.spec, fill=-1)
        return self._memo[key]

    def _positions_within(self, axis: AxisLayout, window: Window) -> Node:
        """Positions in a part of another axis; -1 for rows outside it."""
        outer = self.positions(Shard(window.axis, 0))
        at = self.call(aten.sub.Scalar, outer, window.start)
        is_before = self.call(aten.lt.Scalar, at, 0)
        is_behind = self.call(aten.ge.Scalar, at, self.size(axis.length))
        is_outside = self.call(aten.logical_or.default, is_before, is_behind)
        return self.call(aten.masked_fill.Scalar, at, is_outside, -1)

    @property
    def _device(self) -> torch.device:
        tensors = [
            n.meta["val"]
            for n in self._old.find_nodes(op="placeholder")
            if is_tensor(n)
        ]
        return tensors[0].device if tensors else torch.device("cpu")

    def where_rows(self, rows: Node, x: Node, shard: Shard, *, rank: int) -> Node:
        """``x`` where the bool ``rows`` ``(T,)`` hold, else 0."""
        rows = self._spread_rows(rows, shard, rank=rank)
        return self.call(aten.where.ScalarOther, rows, x, 0)

    def _spread_rows(self, rows: Node, shard: Shard, *, rank: int) -> Node:
        """Something of each row ``(T,)``, to be broadcast against a value."""
        if shard.outer != 1 or shard.inner != 1:
            sizes = [self.expression(shard.outer), -1, self.expression(shard.inner)]
            rows = self.call(aten.reshape.default, rows, [1, -1, 1])
            rows = self.call(aten.expand.default, rows, sizes)
        return _broadcast_rows(self, rows, shard, rank)

    def positions_along(self, shard: Shard, rank: int) -> Node:
        """Positions of rows, to be broadcast against a value of that rank."""
        return _broadcast_rows(self, self.positions(shard), shard, rank)

    def indices(self, node: Node, dim: int, shard: Shard) -> Node:
        """Global indices along a dim of a sharded value, to be broadcast against it."""
        rank, sizes = len(node.meta["val"].shape), node.meta["val"].shape
        count = self._axes[shard.axis].length
        if dim != shard.dim:
            return self._range(self.size(sizes[dim]), rank - dim)
        inner = self.expression(shard.inner)
        at = self.call(aten.mul.Tensor, self.positions(shard), inner)
        if shard.outer != 1 or shard.inner != 1:
            stride = self.expression(size_expression(count) * shard.inner)
            outer = self._range(self.expression(shard.outer), 3)
            at = self.call(aten.reshape.default, at, [1, -1, 1])
            at = self.call(
                aten.add.Tensor, at, self.call(aten.mul.Tensor, outer, stride)
            )
            at = self.call(aten.add.Tensor, at, self._range(inner, 1))
        shape = [-1, *(1 for _ in range(rank - dim - 1))]
        return self.call(aten.reshape.default, at, shape)

    def axis_length(self, shard: Shard) -> int | Node:
        """Tokens S of the axis that a value is cut along."""
        return self.size(self._axes[shard.axis].length)

    def row_table(self, shard: Shard) -> Node:
        """Which row of this rank each position is, ``(S,)`` int64; -1 for others'."""
        key = ("rows", shard.axis, self._modes)
        if key not in self._memo:
            axis, device = self._axes[shard.axis], self._device
            positions = self.positions(shard)
            length = self.size(axis.length)
            more = self.size(axis.length + 1)
            is_pad = self.call(aten.lt.Scalar, positions, 0)
            at = self.call(aten.masked_fill.Scalar, positions, is_pad, length)
            rows = self.call(
                aten.arange.default, self.size(axis.shard_size), device=device
            )
            table = self.call(
                aten.full.default, [more], -1, dtype=torch.int64, device=device
            )
            table = self.call(aten.index_copy.default, table, 0, at, rows)
            self._memo[key] = self.call(aten.slice.Tensor, table, 0, 0, length)
        return self._memo[key]

    def _range(self, size: int | Node, rank: int) -> Node:
        """0, 1, ... along the first of so many dims."""
        numbers = self.call(aten.arange.default, size, device=self._device)
        return self.call(aten.reshape.default, numbers, [-1, *(1,) * (rank - 1)])

    def draw_seed(self) -> Node:
        """A number drawn at each run; it is saved for backward, never drawn again."""
        seed = self.call(
            aten.randint.low, 0, _SEEDS, [1], dtype=torch.int64, device=self._device
        )
        for tag in ("recompute", "ac_graph_id"):
            seed.meta.pop(tag, None)
        return seed

    def fill_pads(self, x: Node, shard: Shard, value: float, *, rank: int) -> Node:
        """``x`` with another value in the rows of pads."""
        if not self._axes[shard.axis].padded:
            return x
        real = self.call(aten.ge.Scalar, self.positions(shard), 0)
        real = self._spread_rows(real, shard, rank=rank)
        return self.call(aten.where.ScalarOther, real, x, value)

    def keep_rows(self, x: Node, shard: Shard, rank: int) -> Node:
        """``x``, without the gradient that would come through the rows of pads."""
        real = self.call(aten.ge.Scalar, self.positions(shard), 0)
        real = self._spread_rows(real, shard, rank=rank)
        same = self.call(aten.detach.default, x)
        return self.call(aten.where.self, real, x, same)

    def mask_pads(self, x: Node, shard: Shard, *, rank: int) -> Node:
        """``x`` with the rows of pads set to 0."""
        return self.fill_pads(x, shard, 0, rank=rank)

    # ---- placements ------------------------------------------------------------------

    def shard_of(self, node: Node) -> Shard:
        """The placement of an old node that is known to be sharded."""
        placement = self._placements.decisions[node].placement
        assert placement is not None, f"{node} is sharded"
        return placement

    def is_sharded(self, node: Node) -> bool:
        """Whether an old node's value is cut over the ranks."""
        return self._placements.decisions[node].placement is not None

    def stack_ranks(self, x: Node, shard: Shard) -> Node:
        """``x`` of each rank, of size 1 along the shard's dim, one behind the other."""
        spec = parse_spec(self._axes[shard.axis].spec)
        size = spec.layout.cp_size
        text = format_spec(replace(spec, layout=Layout("contiguous", size)))
        return self.call(GATHER, x, shard.dim, size, spec=text)

    def reduce(self, x: Node) -> Node:
        """Sum over the ranks; every rank then has the whole."""
        return self.call(REDUCE, x, spec=self._axes[0].spec)

    def cut(self, x: Node, to: Shard, *, rank: int, fill: float | None = None) -> Node:
        """This rank's rows of a replicated value; pads copy others or are ``fill``."""
        axis = self._axes[to.axis]
        sides = (self.expression(to.outer), self.expression(to.inner))
        if axis.window is not None:
            own = self._cut_window(x, to)
            return own if fill is None else self.fill_pads(own, to, fill, rank=rank)
        options = {} if fill is None else {"fill": fill}
        return self.call(SHARD, x, to.dim, *sides, spec=axis.spec, **options)

    def _cut_window(self, x: Node, to: Shard) -> Node:
        """Rows of a part of an axis; pads copy the first or the last of them."""
        call, dim = self.call, to.dim
        last = self.size(self._axes[to.axis].length - 1)
        rows = call(aten.clamp.default, self.positions(to), 0, last)
        if to.outer == 1 and to.inner == 1:
            return call(aten.index_select.default, x, dim, rows)
        sides = (self.expression(to.outer), self.expression(to.inner))
        split = call(aten.unflatten.int, x, dim, [sides[0], -1, sides[1]])
        own = call(aten.index_select.default, split, dim + 1, rows)
        return call(aten.flatten.using_ints, own, dim, dim + 2)

    def join(self, x: Node, shard: Shard) -> Node:
        """The whole of a sharded value."""
        axis = self._axes[shard.axis]
        sides = (self.expression(shard.outer), self.expression(shard.inner))
        if axis.window is None:
            length = self.size(axis.length)
            return self.call(GATHER, x, shard.dim, length, *sides, spec=axis.spec)
        outer = replace(shard, axis=axis.window.axis)
        whole, start = self.join(x, outer), axis.window.start
        dim, end = shard.dim, self.size(axis.length + start)
        split = self.call(aten.unflatten.int, whole, dim, [sides[0], -1, sides[1]])
        part = self.call(aten.slice.Tensor, split, dim + 1, start, end)
        return self.call(aten.flatten.using_ints, part, dim, dim + 2)

    def is_part(self, shard: Shard) -> bool:
        """Whether a value's axis is a part of another, so that its shards have pads."""
        return self._axes[shard.axis].window is not None

    def operand(self, node: Node, wanted: Placement, *, by_shards: bool) -> Node:
        """An old node's value as its consumer wants it.

        Args:
            node: the old node.
            wanted: the placement the consumer needs.
            by_shards: whether the consumer runs on shards: then a replicated value's
                gradient is partial on each rank and must be summed.
        """
        have = self._placements.decisions[node].placement
        spreads = wanted is None and by_shards and self._needs_grad[node]
        if spreads and node in self._spread_inputs:
            return self._spread_inputs[node]
        if have == wanted and not spreads:
            return self.env[node]
        key = (node, wanted, by_shards and wanted is None, self._modes)
        if key not in self._memo:
            x = self.env[node] if have is None else self.join(self.env[node], have)
            if wanted is not None:
                x = self._cut_operand(node, x, wanted)
            elif spreads:
                x = self.spread([x])[0]
            self._memo[key] = x
        return self._memo[key]

    def _cut_operand(self, node: Node, x: Node, to: Shard) -> Node:
        rank = len(node.meta["val"].shape)
        if not (self.is_part(to) and self._needs_grad[node]):
            return self.cut(x, to, rank=rank)
        # Rows are picked, not resharded: ranks' gradients must be summed.
        own = self.cut(self.spread([x])[0], to, rank=rank)
        return self.keep_rows(own, to, rank)

    def forget_reshards(self) -> None:
        """After a write in place, values must be cut and joined anew."""
        self._memo = {k: v for k, v in self._memo.items() if k[0] == "size"}

    def needs_grad(self, node: Node) -> bool:
        """Whether an old node's value may need a gradient."""
        return self._needs_grad[node]

    def set_spread(self, inputs: list[Node], spread: list[Node]) -> None:
        """Say what stands for these inputs where shards use them."""
        self._spread_inputs.update(zip(inputs, spread, strict=True))

    def spread(self, xs: list[Node]) -> list[Node]:
        """Replicated values for use by shards: their gradients are summed once."""
        out = self.call(SPREAD, xs, spec=self._axes[0].spec)
        return [self.call(operator.getitem, out, i) for i in range(len(xs))]

    def scale_grad(self, x: Node, factor: float) -> Node:
        """The identity; its gradient is multiplied by ``factor``."""
        return x if factor == 1.0 else self.call(SCALE_GRAD, x, factor)


def _broadcast_rows(emitter: Emitter, rows: Node, shard: Shard, rank: int) -> Node:
    """A tensor ``(n,)`` laid along the cut dim of a value of that rank."""
    shape = [1] * rank
    shape[shard.dim] = -1
    return emitter.call(aten.reshape.default, rows, shape)


def _find_grads(graph: Graph) -> dict[Node, bool]:
    """Whether a value may need a gradient: from the inputs that do, forward."""
    needs: dict[Node, bool] = {}
    enabled = True
    # A write in place may carry a gradient through memory: then all is spread.
    ops = [op for node in graph.nodes if (op := read_op(node)) is not None]
    writes = any(op.is_mutable for op in ops)
    for node in graph.nodes:
        if node.op == "placeholder":
            needs[node] = bool(node.meta.get("requires_grad"))
            continue
        if node.target is SET_GRAD_ENABLED:
            enabled = bool(node.args[0])
        is_number = is_float(node) or is_complex(node)
        reads = enabled and any(needs[n] for n in node.all_input_nodes)
        needs[node] = is_number and (writes or reads)
    return needs
