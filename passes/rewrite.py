"""Write the graph of one rank: every op on what its decision says.

The editing half of the pass: it can't fail, since ``propagate_layout`` decided all.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument, map_arg

from ringcompile.ops import RING_ATTENTION
from ringcompile.passes.emitter import AxisLayout, Emitter
from ringcompile.passes.op import Op, is_float, is_tensor, read_op, shape_of
from ringcompile.passes.places import where
from ringcompile.passes.propagate_layout import (
    SIZE_READERS,
    Decision,
    Placements,
    Shard,
)
from ringcompile.passes.sharded_inputs import LOCAL
from ringcompile.torch_private import (
    AUTOCAST_CALLS,
    SET_GRAD_ENABLED,
    size_expression,
    size_hint,
)

aten = torch.ops.aten

_BUCKET_BYTES = 64 << 20
_BUCKET_LENGTH = 32


@dataclass(frozen=True, slots=True)
class Gathered:
    """A value that was made whole on every rank.

    Attributes:
        where: the user's line and the node.
        node: name of the node that needs it.
        what: the op that needs it, or the output that it is.
        num_bytes: of the whole value.
        because: why it can't stay sharded.
    """

    where: str
    node: str
    what: str
    num_bytes: int
    because: str


@dataclass(frozen=True, slots=True)
class Sharding:
    """How the graph of one rank is to be written.

    Attributes:
        axes: one layout for each sequence axis.
        gathers_outputs: whether outputs are whole, as in eager.
        param_factors: what a parameter's gradient is multiplied by in sharded and in
            replicated use; (1, 1) and summed over ranks unless ``grads="local"``.
        sums_grads: whether parameters' gradients are summed over the ranks.
    """

    axes: tuple[AxisLayout, ...]
    gathers_outputs: bool = True
    param_factors: tuple[float, float] = (1.0, 1.0)
    sums_grads: bool = True


def rewrite(
    gm: GraphModule, placements: Placements, plans: dict[Node, str], sharding: Sharding
) -> tuple[GraphModule, tuple[Gathered, ...]]:
    """Write one rank's graph.

    Args:
        gm: the graph with ``ring_attention`` calls on global shapes.
        placements: what ``propagate_layout`` decided for it.
        plans: the rank's plan text for each of those calls.
        sharding: layouts and policies.

    Returns:
        The rank's graph and every value that is gathered in it.
    """
    writer = _Writer(gm, placements, plans, sharding)
    graph = writer.write()
    graph.eliminate_dead_code()
    new = GraphModule(gm, graph)
    new.meta.update(gm.meta)
    return new, tuple(writer.gathered)


class _Writer:
    def __init__(
        self,
        gm: GraphModule,
        placements: Placements,
        plans: dict[Node, str],
        sharding: Sharding,
    ) -> None:
        self.gathered: list[Gathered] = []
        self._old = gm.graph
        self._decisions = placements.decisions
        self._plans = plans
        self._sharding = sharding
        self._emit = Emitter(gm.graph, placements, sharding.axes)

    def write(self) -> Graph:
        emit = self._emit
        inputs = self._old.find_nodes(op="placeholder")
        for node in inputs:
            emit.env[node] = emit.graph.node_copy(node)
        self._write_whole_inputs(inputs)
        self._write_parameter_uses()
        for node in self._old.nodes:
            if node.op not in ("placeholder", "output"):
                with emit.writing_for(node):
                    emit.env[node] = self._write_node(node)
        self._write_output()
        return emit.graph

    def _write_whole_inputs(self, inputs: Sequence[Node]) -> None:
        """Make lengths global, and whole what comes as a shard and is used whole."""
        emit = self._emit
        shards = [n for n in inputs if LOCAL in n.meta]
        for node in shards:
            emit.env[node].meta["val"] = node.meta[LOCAL]
            if is_tensor(node):
                emit.note_local_size(node)
        for node in shards:
            if not is_tensor(node):
                emit.env[node] = self._write_size(node)
            elif self._decisions[node].placement is None:
                self._write_whole_input(node)

    def _write_whole_input(self, node: Node) -> None:
        shard = self._emit.find_shard(node)
        self._emit.env[node] = self._emit.join(self._emit.env[node], shard)
        if is_float(node):
            because = self._decisions[node].gathered
            what = f"input {node.name}"
            self.gathered.append(
                Gathered(node.name, node.name, what, _bytes(node), because)
            )

    def _write_parameter_uses(self) -> None:
        """Spread all parameters that shards use, in few buckets, at the top."""
        emit = self._emit
        used = self._parameters_used_by_shards()
        if self._sharding.sums_grads:
            for bucket in _make_buckets(used):
                spread = emit.spread([emit.env[node] for node in bucket])
                emit.set_spread(bucket, spread)
            return
        by_shards, replicated = self._sharding.param_factors
        parameters = [n for n in used if n.meta.get("is_parameter")]
        scaled = [emit.scale_grad(emit.env[n], by_shards) for n in parameters]
        emit.set_spread(parameters, scaled)
        for node in self._old.find_nodes(op="placeholder"):
            if node.meta.get("is_parameter") and emit.needs_grad(node):
                emit.env[node] = emit.scale_grad(emit.env[node], replicated)

    def _parameters_used_by_shards(self) -> list[Node]:
        found: dict[Node, None] = {}
        for node, decision in self._decisions.items():
            if not decision.is_sharded or (op := read_op(node)) is None:
                continue
            for operand, wanted in zip(op.slots, decision.operands, strict=True):
                is_input = operand.op == "placeholder" and wanted is None
                if is_input and self._emit.needs_grad(operand):
                    found[operand] = None
        return list(found)

    def _write_node(self, node: Node) -> Node:
        emit = self._emit
        if node.target is SET_GRAD_ENABLED or node.target in AUTOCAST_CALLS:
            emit.enter_mode(node.name)
        decision = self._decisions[node]
        op = read_op(node)
        if op is None:
            if node.target is not operator.getitem:
                self._note_gathers(node, "no rule knows how it acts on a shard")
            return emit.copy(node, lambda n: self._whole(n, node))
        if op.packet in SIZE_READERS:
            return self._write_size(node)
        if decision.gathered:
            self._note_gathers(node, decision.gathered)
        operands = [
            emit.operand(n, wanted, by_shards=decision.is_sharded)
            for n, wanted in zip(op.slots, decision.operands, strict=True)
        ]
        if decision.collector is not None:
            return decision.collector.emit(emit, op, operands)
        emit.name_after(node)
        if node.target is RING_ATTENTION:
            self._note_moves(op, decision)
            args = op.with_slots(operands) | {"plan": self._plans[node]}
            return emit.call_op(op, self._map_sizes(args))
        written = self._write_local(op, decision, operands)
        if op.is_mutable:
            emit.forget_reshards()
        return written

    def _write_size(self, node: Node) -> Node:
        """A node that is a size: the whole one, wherever it was read."""
        size = self._emit.size(node.meta["val"])
        return size if isinstance(size, Node) else self._emit.call(operator.index, size)

    def _write_local(self, op: Op, decision: Decision, operands: list[Node]) -> Node:
        emit, flow, shard = self._emit, decision.flow, decision.placement
        args = self._map_sizes(op.with_slots(operands))
        if flow is None or shard is None:
            return emit.call_op(op, args)
        if flow.is_view:
            sizes = [emit.size(n) for n in shape_of(op.node)]
            sizes[shard.dim] = -1
            return emit.call(aten.reshape.default, operands[0], sizes)
        if flow.sizes is not None:
            sizes = [*args[flow.sizes]]  # type: ignore[misc]
            sizes[shard.dim] = (
                -1 if operands and not flow.is_constant else self._local_size(shard)
            )
            args[flow.sizes] = sizes
        return emit.call_op(op, args)

    def _local_size(self, shard: Shard) -> int | Node:
        axis = self._sharding.axes[shard.axis]
        local = size_expression(axis.shard_size)
        return self._emit.expression(shard.outer * local * shard.inner)

    def _map_sizes(self, args: dict[str, Argument]) -> dict[str, Argument]:
        """Old nodes that are no tensors (sizes, scalars) become their new ones."""
        env = self._emit.env
        return {k: map_arg(v, lambda n: env.get(n, n)) for k, v in args.items()}

    def _whole(self, node: Node, user: Node) -> Node:
        """An operand of something that is no op: whole, unless it just picks one."""
        if user.target is operator.getitem:
            return self._emit.env[node]
        return self._emit.operand(node, None, by_shards=False)

    def _note_moves(self, op: Op, decision: Decision) -> None:
        """An operand that lies otherwise than its attention reads it is made whole."""
        slots = zip(op.slots, op.slot_names, decision.operands, strict=True)
        for operand, name, wanted in slots:
            if self._decisions[operand].placement in (None, wanted):
                continue
            because = "it is cut along another sequence than attention takes it for"
            if name == "biases":
                because = "a row of biases is read over all keys"
            self.gathered.append(
                Gathered(
                    *(where(op.node), op.node.name, f"{op.packet} of {operand.name}"),
                    *(_bytes(operand), because),
                )
            )

    def _note_gathers(self, user: Node, because: str) -> None:
        op = read_op(user)
        what = str(user.target if op is None else op.packet)
        self.gathered += [
            Gathered(where(user), user.name, what, _bytes(node), because)
            for node in user.all_input_nodes
            if self._decisions[node].placement is not None
        ]

    def _write_output(self) -> None:
        old = self._old.output_node()
        number = 0

        def result(node: Node) -> Node:
            nonlocal number
            number += 1
            shard = self._decisions[node].placement
            if shard is None:
                return self._emit.env[node]
            because = 'outputs="gathered"'
            if not self._sharding.gathers_outputs:
                if not self._emit.is_part(shard):
                    return self._emit.env[node]
                because = "a part of the sequence has no shards of its own"
            what = f"output {number - 1}"
            made_at = where(node)
            self.gathered.append(
                Gathered(made_at, node.name, what, _bytes(node), because)
            )
            with self._emit.writing_for(node):
                return self._emit.operand(node, None, by_shards=False)

        args = map_arg(old.args[0], result)
        self._emit.graph.output(args)


def _bytes(node: Node) -> int:
    value = node.meta["val"]
    count = 1
    for size in value.shape:
        count *= size_hint(size)
    return int(count * value.element_size())


def _make_buckets(nodes: Sequence[Node]) -> list[list[Node]]:
    """Group parameters: each all-reduce carries at most 64 MiB, or one, and 32 of them.

    What compilers do with a list of results grows with the square of its length.
    """
    buckets: list[list[Node]] = []
    room = 0
    for node in nodes:
        is_full = not buckets or len(buckets[-1]) == _BUCKET_LENGTH
        if is_full or _bytes(node) > room:
            buckets.append([])
            room = _BUCKET_BYTES
        buckets[-1].append(node)
        room -= _bytes(node)
    return buckets
