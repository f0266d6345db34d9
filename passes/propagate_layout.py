"""Decide where every value lies, and what each op needs of its operands.

Reads the graph, edits nothing. The sequence axes are the factors of the attentions'
Q; every float value that has one is sharded along it where a rule proves its op local.
Integers, and what is computed from them alone, stay replicated. An op that no rule
knows runs replicated on gathered operands. Invariant: a replicated value is equal on
all ranks.
"""

import operator
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import sympy
import torch
from torch.fx import Graph, Node

from ringcompile.errors import ShardingError
from ringcompile.ops import RING_ATTENTION
from ringcompile.passes.collectors import Collector, find_collector
from ringcompile.passes.collectors.windows import SLICES, WINDOW, find_start
from ringcompile.passes.dims import Dim, Dims, Factors, Size
from ringcompile.passes.memory import find_base, find_written, writes_memory
from ringcompile.passes.op import (
    Op,
    is_complex,
    is_float,
    is_tensor,
    read_op,
    shape_of,
)
from ringcompile.passes.places import where
from ringcompile.passes.rules import find_rule
from ringcompile.passes.rules.flow import Flow, Link
from ringcompile.passes.sharded_inputs import LOCAL
from ringcompile.torch_private import size_expression, sizes_equal


@dataclass(frozen=True, slots=True)
class Shard:
    """A value cut along ``[outer, S, inner]`` of one dim; None stands for replicated.

    Attributes:
        axis: number of the sequence axis.
        dim: the dim that is cut.
        outer: size of what stands before the sequence in that dim, 1 if nothing; an
            expression: sizes may be symbolic, and comparing those adds guards.
        inner: size of what stands behind it.
    """

    axis: int
    dim: int
    outer: sympy.Expr = sympy.S.One
    inner: sympy.Expr = sympy.S.One

    def __str__(self) -> str:
        return f"shard({self.dim})"


Placement = Shard | None


@dataclass(frozen=True, slots=True)
class Window:
    """Neighbouring positions of another axis, on the ranks that hold them there.

    Attributes:
        axis: number of that axis.
        start: the position there of the first one.
    """

    axis: int
    start: int


@dataclass(frozen=True, slots=True)
class Axis:
    """One sequence that is cut over the ranks.

    Attributes:
        factor: the factor that names it.
        length: tokens S, possibly symbolic.
        window: where it lies, if it is a part of another.
    """

    factor: int
    length: Size
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """How one node runs.

    Attributes:
        placement: of its result.
        operands: what each tensor operand must be, in the order of ``Op.slots``.
        flow: the rule's word, for ops that run on shards as they are.
        collector: what carries it out with the help of other ranks, if it needs that.
        gathered: why a sharded operand must be gathered; empty if none.
    """

    placement: Placement
    operands: tuple[Placement, ...] = ()
    flow: Flow | None = None
    collector: Collector | None = None
    gathered: str = ""

    @property
    def is_sharded(self) -> bool:
        """Whether the op runs on a shard, so that ranks compute different things."""
        return self.placement is not None or any(self.operands)

    @property
    def is_plain(self) -> bool:
        """Whether the op runs as in eager, on the memory that it had there."""
        changed = self.is_sharded or self.gathered or self.collector is not None
        return not changed


@dataclass(frozen=True, slots=True)
class Placements:
    """All decisions of one graph, and its sequence axes.

    Attributes:
        axes: every sequence that is cut.
        decisions: of every node.
        attention_axes: numbers of the axes of an attention's queries and keys.
    """

    axes: tuple[Axis, ...]
    decisions: dict[Node, Decision]
    attention_axes: dict[Node, tuple[int, int]]


def propagate_layout(
    graph: Graph, cross: AbstractSet[Node] = frozenset()
) -> Placements:
    """Decide the placement of every node of a graph with ``ring_attention`` calls.

    Args:
        graph: the graph; left as it is.
        cross: calls whose keys are another sequence than the queries.
    """
    factors = Factors()
    ops = {node: op for node in graph.nodes if (op := read_op(node)) is not None}
    dims, flows = _find_dims(graph, ops, factors, cross)
    axes, attention_axes = _find_axes(graph, dims, factors, cross)
    decide = _Decider(ops, dims, flows, factors, axes, attention_axes)
    for node in graph.nodes:
        decide(node)
    return Placements(tuple(decide.axes), decide.decisions, attention_axes)


def _find_dims(
    graph: Graph, ops: dict[Node, Op], factors: Factors, cross: AbstractSet[Node]
) -> tuple[dict[Node, Dims], dict[Node, Flow]]:
    dims: dict[Node, Dims] = {}
    flows: dict[Node, Flow] = {}
    for node in graph.nodes:
        if node.target is operator.getitem and node.args[0] in dims:
            dims[node] = _fit_dims(dims[node.args[0]], node, factors)
            continue
        op = ops.get(node)
        flow = None if op is None else _apply_rule(op, factors, dims, cross)
        if flow is not None:
            flows[node], dims[node] = flow, flow.dims
        elif is_tensor(node):
            dims[node] = factors.new_dims(shape_of(node))
    return dims, flows


def _fit_dims(dims: Dims, node: Node, factors: Factors) -> Dims:
    """Dims of one result of several: a split's pieces may be of different sizes."""
    if not is_tensor(node):
        return dims
    return tuple(
        dim if sizes_equal(factors.product(dim), size) else factors.new(size)
        for dim, size in zip(dims, shape_of(node), strict=True)
    )


def _apply_rule(
    op: Op, factors: Factors, dims: dict[Node, Dims], cross: AbstractSet[Node]
) -> Flow | None:
    operands = [dims[node] for node in op.slots]
    if op.node.target is RING_ATTENTION:
        return _flow_of_attention(op, factors, operands, is_cross=op.node in cross)
    rule = find_rule(op)
    flow = rule(op, factors, operands) if rule is not None else None
    if flow is not None and len(flow.dims) != len(shape_of(op.node)):
        return None
    return flow


def _flow_of_attention(
    op: Op, factors: Factors, operands: list[Dims], *, is_cross: bool
) -> Flow:
    """(B, H, S, D), (B, G, S, D), (B, G, S, E), captures, and biases with S rows."""
    q, k, v = operands[:3]
    for other in (k, v):
        factors.unite(q[0], other[0])
        factors.unite(k[2] if is_cross else q[2], other[2])
    for slot, dims in enumerate(operands):
        if _is_cut_bias(op, slot):
            factors.unite(q[2], dims[2])
    links = {Link(slot, 2, 2) for slot in range(3)} | {Link(0, 0, 0), Link(0, 1, 1)}
    rows = _name_rows(factors, op.slots[0], q)
    return Flow((q[0], q[1], rows, v[3]), frozenset(links))


def _name_rows(factors: Factors, node: Node, dims: Dims) -> Dim:
    """The rows of Q or K as one factor; rows made of several are cut right here."""
    return dims[2] if len(dims[2]) == 1 else factors.new(shape_of(node)[2])


def _is_cut_bias(op: Op, slot: int) -> bool:
    """Whether a slot of an attention holds a bias with a row for each query."""
    if op.slot_names[slot] != "biases":
        return False
    return not sizes_equal(shape_of(op.slots[slot])[2], 1)


def _find_axes(
    graph: Graph, dims: dict[Node, Dims], factors: Factors, cross: AbstractSet[Node]
) -> tuple[tuple[Axis, ...], dict[Node, tuple[int, int]]]:
    axes: list[Axis] = []
    numbers: dict[int, int] = {}
    attention_axes: dict[Node, tuple[int, int]] = {}

    def find_number(sequence: Dim, node: Node) -> int:
        factor = factors.find(sequence[0])
        if factor not in numbers:
            numbers[factor] = len(axes)
            axes.append(Axis(factor, shape_of(node)[2]))
        return numbers[factor]

    for node in graph.nodes:
        if node.target is not RING_ATTENTION:
            continue
        sequence = dims[node][2]
        if len(sequence) != 1:
            raise ShardingError(
                f"attention over a sequence of shape {tuple(shape_of(node))}",
                at=where(node),
                because="its sequence dim is no single extent that can be cut",
                instead='options={"unsupported": "gather"} with another view of it',
            )
        number = key_number = find_number(sequence, node)
        if node in cross:
            k = node.args[1]
            key_number = find_number(_name_rows(factors, k, dims[k]), k)
        attention_axes[node] = number, key_number
    return tuple(axes), attention_axes


_NUM_QKV = 3
SIZE_READERS = (torch.ops.aten.sym_size, torch.ops.aten.sym_numel)
"""Ops that read a size: always the global one, wherever the value lies."""


class _Decider:
    """Walks the graph once, in order."""

    def __init__(
        self,
        ops: dict[Node, Op],
        dims: dict[Node, Dims],
        flows: dict[Node, Flow],
        factors: Factors,
        axes: tuple[Axis, ...],
        attention_axes: dict[Node, tuple[int, int]],
    ) -> None:
        self.decisions: dict[Node, Decision] = {}
        self.axes = list(axes)
        self._ops = ops
        self._dims = dims
        self._flows = flows
        self._factors = factors
        self._attention_axes = attention_axes

    def __call__(self, node: Node) -> None:
        """Decide one node; its operands are decided already."""
        if LOCAL in node.meta:
            self.decisions[node] = self._decide_input(node)
            return
        if node.target is operator.getitem and is_tensor(node):
            source = self._placement(node.args[0])
            self.decisions[node] = Decision(source, (source,))
            return
        op = self._ops.get(node)
        self.decisions[node] = Decision(None) if op is None else self._decide(op)
        if writes_memory(node):
            _check_mutation(node, self.decisions)

    def _decide_input(self, node: Node) -> Decision:
        """An input that comes as a shard, or as a length."""
        if not is_tensor(node):
            return Decision(None)
        places = self._places(self._dims[node]) if is_float(node) else []
        if len(places) == 1:
            return Decision(places[0])
        return Decision(None, gathered="no attention's tokens are known to be its rows")

    def _placement(self, node: object) -> Placement:
        return self.decisions[node].placement if isinstance(node, Node) else None

    def _decide(self, op: Op) -> Decision:
        current = [self._placement(node) for node in op.slots]
        flow = self._flows.get(op.node)
        if op.node.target is RING_ATTENTION:
            return self._decide_attention(op, flow)
        if flow is not None and flow.is_constant:  # operands only lend their dtype
            places = self._places(flow.dims) if is_float(op.node) else []
            placement = places[0] if len(places) == 1 else None
            return Decision(placement, tuple(current), flow)
        if any(current) or is_float(op.node):
            # Complex values are not sent, so none is cut.
            can_be_cut = not any(map(is_complex, (op.node, *op.slots)))
            local = self._find_local(op, flow) if can_be_cut and flow else None
            if local is not None:
                return local
        if not any(current) or op.packet in SIZE_READERS:
            return Decision(None, tuple(current))
        return self._decide_mixing(op, current, flow)

    def _decide_mixing(
        self, op: Op, current: list[Placement], flow: Flow | None
    ) -> Decision:
        """An op of sharded operands that is not local: a part, a sum, or gathered."""
        window = self._find_window(op, current)
        if window is not None:
            return Decision(window, tuple(current), collector=WINDOW)
        collector = find_collector(op, current)
        if collector is not None:
            operands = collector.operands(op, current)
            placement = collector.placement(op, current)
            return Decision(placement, tuple(operands), collector=collector)
        because = (
            "no rule knows how it acts on a shard"
            if flow is None
            else "it mixes positions of the sequence"
        )
        return Decision(None, (None,) * len(current), gathered=because)

    def _decide_attention(self, op: Op, flow: Flow | None) -> Decision:
        """Queries and KV are cut along their axes, whatever they were before."""
        queries, keys = (Shard(number, 2) for number in self._attention_axes[op.node])
        # Captures are read whole, at global positions.
        others = (
            queries if _is_cut_bias(op, slot) else None
            for slot in range(_NUM_QKV, len(op.slots))
        )
        return Decision(queries, (queries, keys, keys, *others), flow)

    def _find_local(self, op: Op, flow: Flow) -> Decision | None:
        """The op on shards, if the one axis of its result passes every operand."""
        places = self._places(flow.dims)
        if len(places) != 1:
            return None
        result = places[0]
        operands: list[Placement] = []
        for slot, node in enumerate(op.slots):
            at = self._places(self._dims[node])
            linked = [x.operand_dim for x in flow.links if _leads(x, slot, result.dim)]
            if any(p.dim not in linked for p in at) or len(at) > 1:
                return None
            if at:
                cut = at[0] if flow.is_view else replace(result, dim=at[0].dim)
                operands.append(cut)
                continue
            operands.append(self._align(node, linked, op.node, result))
        if not any(operands):
            return None
        return Decision(result, tuple(operands), flow)

    def _find_window(self, op: Op, current: list[Placement]) -> Shard | None:
        """Where a slice lies, if it can stay on the rows that it has."""
        shard = current[0]
        if op.packet not in SLICES or shard is None or not WINDOW.accepts(op, current):
            return None
        factor = self._dims[op.node][shard.dim]
        start = find_start(op)
        if len(factor) != 1 or start is None:
            return None
        window = Window(shard.axis, start)
        if (outer := self.axes[shard.axis].window) is not None:
            window = Window(outer.axis, outer.start + start)
        name = self._factors.find(factor[0])
        for number, axis in enumerate(self.axes):
            if self._factors.find(axis.factor) == name:
                same = axis.window == window
                return Shard(number, shard.dim) if same else None
        self.axes.append(Axis(name, shape_of(op.node)[shard.dim], window))
        return Shard(len(self.axes) - 1, shard.dim)

    def _align(
        self, node: Node, linked: Iterable[int], result_node: Node, result: Shard
    ) -> Placement:
        """An operand that spans the axis unseen is cut as the result is."""
        size = shape_of(result_node)[result.dim]
        for d in linked:
            if sizes_equal(shape_of(node)[d], size):
                return Shard(result.axis, d, result.outer, result.inner)
        return None

    def _places(self, dims: Dims) -> list[Shard]:
        found = []
        for number, axis in enumerate(self.axes):
            for d, i in self._factors.place_of(dims, axis.factor):
                outer, inner = self._sides(dims[d], i)
                found.append(Shard(number, d, outer, inner))
        return found

    def _sides(self, dim: Dim, place: int) -> tuple[sympy.Expr, sympy.Expr]:
        before, after = dim[:place], dim[place + 1 :]
        product = self._factors.product
        return size_expression(product(before)), size_expression(product(after))


def _leads(link: Link, slot: int, result_dim: int) -> bool:
    return link.slot == slot and link.result_dim == result_dim


def _check_mutation(node: Node, decisions: dict[Node, Decision]) -> None:
    """A write in place must reach all who read that memory: none of it may be cut."""
    bases = {find_base(n) for n in find_written(node)}
    aliases = [n for n in decisions if n is not node and find_base(n) in bases]
    if not decisions[node].is_sharded and all(decisions[n].is_plain for n in aliases):
        return
    op = read_op(node)
    assert op is not None, "what writes memory is an op"
    raise ShardingError(
        f"{op.packet} writes in place to a value that is cut over the ranks",
        at=where(node),
        because="the write could be lost on the value that others read",
        instead="write it out of place (x = x + y)",
    )
