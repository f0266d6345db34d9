"""Find softmaxes whose weights meet a V and whose scores come from a Q and a K.

Looks at the shape of the graph only; what the ops between do is read elsewhere.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from ringcompile.ir.mask import EmptyRow
from ringcompile.passes.coordinates import read_index_map
from ringcompile.passes.op import Op, is_float, is_tensor, read_op, shape_of
from ringcompile.passes.operands import CASTS, PRODUCTS, carries_sequence
from ringcompile.passes.value_rules import RULES
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten

_PRODUCTS = {*PRODUCTS, aten.einsum}
_SAFE = aten._safe_softmax  # noqa: SLF001
_SOFTMAXES = {aten.softmax, aten._softmax, _SAFE}  # noqa: SLF001
_LOG_SOFTMAXES = {aten.log_softmax, aten._log_softmax}  # noqa: SLF001
# Ops that a way from a product to a softmax, or from there to a product, may lead over.
_ON_THE_WAY = {*RULES, aten.dropout, aten.native_dropout, aten.constant_pad_nd}


@dataclass(frozen=True, slots=True)
class Softmax:
    """A softmax in any spelling.

    Attributes:
        weights: the node of its result.
        scores: what it is taken of.
        dim: the dim it is taken over.
        infinite: what a row of -inf alone gives; None: it is left to chance.
        inside: the nodes that it is spelled by, if by several.
    """

    weights: Node
    scores: Node
    dim: int
    infinite: EmptyRow | None = EmptyRow.NAN
    inside: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Spelled:
    """An attention spelled out.

    Attributes:
        softmax: its softmax.
        way_down: from Q.K to the softmax's scores, both included.
        outputs: products that the weights go into; ``P @ V`` if there is just one.
        way_out: ops on the weights before those products.
        strangers: other uses of the weights.
    """

    softmax: Softmax
    way_down: tuple[Node, ...]
    outputs: tuple[Node, ...]
    way_out: tuple[Node, ...]
    strangers: tuple[Node, ...]


def find_spelled(graph: Graph) -> Iterator[Spelled]:
    """Every softmax between two products whose scores run over tokens on both sides."""
    for node in graph.nodes:
        softmax = _read_softmax(node)
        if softmax is None:
            continue
        way_down = _find_product(softmax.scores, {})
        if way_down is None or not _is_over_tokens(way_down[0]):
            continue
        outputs, way_out, strangers = _follow_weights(softmax.weights)
        if outputs:
            yield Spelled(softmax, way_down, outputs, way_out, strangers)


# ---- spellings of softmax ------------------------------------------------------------


def _read_softmax(node: Node) -> Softmax | None:
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


def _read_exp_over_sum(op: Op) -> Softmax | None:
    """``e / e.sum(dim, keepdim=True)`` with ``e = exp(x)`` or ``exp(x - amax(x))``."""
    exp, total = _read_both(op)
    if exp is None or exp.packet is not aten.exp:
        return None
    if total is None or total.packet is not aten.sum:
        return None
    if total.slots[0] is not exp.node or not total.args.get("keepdim"):
        return None
    if op.args.get("rounding_mode") is not None or not is_float(total.node):
        return None
    dim = _only_dim(total)
    x = exp.slots[0]
    shift = read_op(x)
    if dim is None:
        return None
    if shift is not None and shift.packet is aten.sub and is_own_max(shift, dim):
        x = shift.slots[0]
    inside = (op.node, *op.slots, exp.slots[0])
    return Softmax(op.node, x, dim, infinite=None, inside=inside)


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
    _, total = _read_both(difference)
    if total is None or total.packet is not aten.logsumexp:
        return None
    if total.slots[0] is not difference.slots[0] or not total.args["keepdim"]:
        return None
    dim = _only_dim(total)
    if dim is None:
        return None
    inside = (op.node, *op.slots, *difference.slots)
    return Softmax(op.node, difference.slots[0], dim, infinite=None, inside=inside)


def _read_both(op: Op) -> tuple[Op | None, Op | None]:
    """The calls that made the two operands of an op; None for what isn't a call."""
    match op.slots:
        case first, second:
            return read_op(first), read_op(second)
    return None, None


def _only_dim(op: Op) -> int | None:
    dims = op.args.get("dim")
    if not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    return int(dims[0]) % len(shape_of(op.slots[0]))


def is_own_max(op: Op, dim: int) -> bool:
    """Whether a difference subtracts a tensor's own maxima over ``dim``, at least."""
    if len(op.slots) != 2 or op.args.get("alpha", 1) != 1:  # noqa: PLR2004
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


# ---- up to Q.K -----------------------------------------------------------------------


def _find_product(
    node: Node, known: dict[Node, tuple[Node, ...] | None]
) -> tuple[Node, ...] | None:
    """The way from the nearest product to ``node``; None if there is none."""
    if node not in known:
        known[node] = None
        known[node] = _find_product_above(node, known)
    return known[node]


def _find_product_above(
    node: Node, known: dict[Node, tuple[Node, ...] | None]
) -> tuple[Node, ...] | None:
    op = read_op(node)
    if op is None:
        return None
    if op.packet in _PRODUCTS:
        return (node,)
    if not may_lead_on(op):
        return None
    # What only lends its shape or dtype, as in `view_as`, holds no scores.
    for slot in op.slots[:1] if moves_elements(op) else op.slots:
        way = _find_product(slot, known)
        if way is not None:
            return (*way, node)
    return None


def may_lead_on(op: Op) -> bool:
    """Whether an op could stand between a product and a softmax."""
    target = op.node.target
    assert isinstance(target, OpOverload), "an Op calls a library op"
    return op.packet in _ON_THE_WAY or torch.Tag.pointwise in target.tags


def _is_over_tokens(product: Node) -> bool:
    op = read_op(product)
    assert op is not None, "a product is an op"
    if op.packet is aten.einsum:
        return all(
            any(carries_sequence(x, d) for d in range(len(shape_of(x))))
            for x in op.slots
        )
    q, k = op.slots[-2:]
    if len(shape_of(q)) == 1 or len(shape_of(k)) == 1:
        return False
    return carries_sequence(q, -2) and carries_sequence(k, -1)


# ---- down to P.V ---------------------------------------------------------------------


def _follow_weights(
    weights: Node,
) -> tuple[tuple[Node, ...], tuple[Node, ...], tuple[Node, ...]]:
    """Products that the weights go into, ops on the way, and other uses."""
    outputs, way_out, strangers = [], [], []
    work = [weights]
    while work:
        node = work.pop()
        for user in node.users:
            op = read_op(user)
            if op is not None and op.packet in _PRODUCTS:
                outputs.append(user)
            elif op is not None and moves_elements(op) and op.slots[0] is node:
                way_out.append(user)
                work.append(user)
            elif user.op == "output" or is_tensor(user):
                strangers.append(user)
    if not outputs and any(_leads_to_product(s) for s in strangers):
        outputs = [next(s for s in strangers if _leads_to_product(s))]
    return tuple(outputs), tuple(way_out), tuple(strangers)


def moves_elements(op: Op) -> bool:
    """Whether an op gives its operand's elements, moved, up to dropout and casts."""
    if not is_tensor(op.node) or not op.node.meta["val"].is_floating_point():
        return False
    return op.packet in (*CASTS, aten.dropout) or read_index_map(op) is not None


def _leads_to_product(node: Node) -> bool:
    work, seen = [node], set()
    while work:
        n = work.pop()
        op = read_op(n)
        if n in seen or op is None:
            continue
        seen.add(n)
        if op.packet in _PRODUCTS:
            return True
        if may_lead_on(op):
            work += n.users
    return False
