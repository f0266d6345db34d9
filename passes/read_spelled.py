"""Read an attention that is spelled out: product, scale, masks, softmax, product."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.fx import Node

from ringcompile.ir.mask import EmptyRow, negate
from ringcompile.passes.find_softmax import (
    Spelled,
    is_own_max,
    keeps_elements,
    same_shape,
)
from ringcompile.passes.op import Op, read_op, shape_of
from ringcompile.passes.operands import find_operands
from ringcompile.passes.parts import Parts, Refused, check_dropout, check_operands
from ringcompile.passes.read_score import Score
from ringcompile.passes.read_values import Reader
from ringcompile.passes.symbolic import Unreadable, Value, read_truth
from ringcompile.passes.value_scalars import holds_tensor, is_constant, read_scalar
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten

_Step = Callable[[Reader, Op, Node, Score], Score]


def read_spelled(reader: Reader, spelled: Spelled) -> Parts:
    """Read operands and score of an attention spelled out.

    Raises:
        Refused: for an op on the way that no ring carries.
        Unreadable: for a mask that isn't a function of positions.
    """
    product, output = spelled.way_down[0], spelled.outputs[0]
    q, k = _read_factors(product)
    _check_weights(spelled)
    dropout = _read_dropout(spelled)
    weights, v = _read_factors(output)
    if weights not in (spelled.softmax.weights, *spelled.way_out):
        raise Refused(
            f"attention whose weights are the second operand of {output.name}",
            because="only weights @ V is built so far",
            instead="write weights @ V",
        )
    _check_shapes(spelled, q, k)
    check_operands(output, q, k, v, k_transposed=True)
    score = Score(1.0)
    for below, node in pairwise(spelled.way_down):
        score = _read_step(reader, below, node, score)
    operands = find_operands(reader, q, k, v, k_transposed=True)
    score = score.cast(spelled.softmax.weights.meta["val"].dtype)
    infinite = EmptyRow.NAN if spelled.softmax.is_one_op else None
    return Parts(output, *operands, score, infinite, dropout)


def _read_factors(product: Node) -> tuple[Node, Node]:
    op = read_op(product)
    assert op is not None, "a product is an op"
    if op.packet is not aten.matmul:
        raise Refused(
            f"attention spelled with {op.packet}",
            because="only torch.matmul on 4-D tensors is built so far (issue 4)",
            instead="spell it with torch.matmul, or call scaled_dot_product_attention",
        )
    return op.slots[0], op.slots[1]


def _check_shapes(spelled: Spelled, q: Node, k: Node) -> None:
    softmax, product = spelled.softmax, spelled.way_down[0]
    ndim = len(shape_of(product))
    if softmax.dim != ndim - 1:
        raise Refused(
            f"attention with a softmax over dim {softmax.dim} of {ndim}",
            because="a query's weights must sum to 1 over its keys, the last dim",
            instead="take the softmax over the last dim",
        )
    for node in (*spelled.way_down[1:], softmax.weights):
        if not same_shape(node, product):
            raise Refused(
                f"attention whose scores change shape from {list(shape_of(product))} to"
                f" {list(shape_of(node))}",
                because=f"{node.name} isn't an op on each score alone",
                instead="keep scores (batch, heads, queries, keys) up to the softmax",
            )
    if ndim == len(shape_of(q)) and not all(
        sizes_equal(a, b)
        for a, b in zip(shape_of(q)[:-1], shape_of(product)[:-1], strict=True)
    ):
        raise Refused(
            f"attention of {shape_of(q)[1]} query heads over {shape_of(k)[1]} of K",
            because="Q would be broadcast over the heads or batch of K",
            instead="give Q the batch size and number of heads of the scores",
        )


def _check_weights(spelled: Spelled) -> None:
    if len(spelled.outputs) > 1 or spelled.strangers:
        others = [n.name for n in (*spelled.strangers, *spelled.outputs[1:])]
        raise Refused(
            f"attention whose weights are also used by {', '.join(others)}",
            because="a ring never holds the weights of all keys at once",
            instead="don't return or change the weights (output_attentions=False)",
        )


def _read_dropout(spelled: Spelled) -> float:
    """The share of weights that are dropped between softmax and product."""
    ops = [op for node in spelled.way_out if (op := read_op(node)) is not None]
    rates = [
        check_dropout(float(read_scalar(op.args["p"])))
        for op in ops
        if op.packet is aten.dropout and op.args["train"]
    ]
    given = [rate for rate in rates if rate != 0]
    if len(given) > 1:
        raise Refused(
            f"attention with dropouts p={given} of its weights",
            because="one is carried",
            instead="one dropout",
        )
    return given[0] if given else 0.0


# ---- one step from Q.K to softmax ----------------------------------------------------


def _read_step(reader: Reader, below: Node, node: Node, score: Score) -> Score:
    """What ``node`` does to the scores that ``below`` holds."""
    op = read_op(node)
    assert op is not None, "the way down leads over ops"
    if op.packet in _STEPS:
        return _STEPS[op.packet](reader, op, below, score)
    if keeps_elements(op) and op.packet is not aten.dropout:
        return score.cast(_dtype(op))
    if op.packet is aten.tanh:
        raise Refused(
            "attention with a softcap (tanh of scores)",
            because="changes of scores other than scale and mask aren't built yet",
            instead="switch the softcap off; this attention runs gathered",
        )
    raise Refused(
        f"attention whose scores go through {node.target}",
        because="changes of scores other than scale and mask aren't built yet",
        instead="scale scores by a number and mask them, nothing else",
    )


def _multiply(reader: Reader, op: Op, below: Node, score: Score) -> Score:
    return score.multiply(_read_factor(reader, op, below), _dtype(op))


def _divide(reader: Reader, op: Op, below: Node, score: Score) -> Score:
    if op.args["self"] is not below or op.args.get("rounding_mode") is not None:
        raise Unreadable(f"{op.node.name} divides by scores or rounds them")
    return score.multiply(1.0 / _read_factor(reader, op, below), _dtype(op))


def _read_factor(reader: Reader, op: Op, below: Node) -> float:
    """The number that scores are multiplied with or divided by."""
    others = [op.args[name] for name in ("self", "other") if op.args[name] is not below]
    if len(others) != 1:
        raise Unreadable(f"{op.node.name} multiplies scores with themselves")
    if not holds_tensor(others[0]):
        return float(read_scalar(others[0]))
    what = f"scores are scaled by {others[0].name}"
    return _only_number(reader.read(others[0]), what)


def _add(reader: Reader, op: Op, below: Node, score: Score) -> Score:
    return score.add(_read_mask_operand(reader, op, below), _dtype(op))


def _subtract(reader: Reader, op: Op, below: Node, score: Score) -> Score:
    if op.args["self"] is below and is_own_max(op):
        return score
    raise Unreadable(f"{op.node.name} subtracts from scores")


def _read_mask_operand(reader: Reader, op: Op, below: Node) -> Value:
    others = [n for n in op.slots if n is not below]
    if len(others) != 1 or op.args.get("alpha", 1) != 1:
        raise Unreadable(f"{op.node.name} adds scores, or a multiple")
    return reader.read(others[0])


def _where(reader: Reader, op: Op, below: Node, score: Score) -> Score:
    keeps = read_truth(reader.read(op.args["condition"]).broadcast(4))
    other = op.args["other"]
    if op.args["self"] is not below:
        keeps, other = negate(keeps), op.args["self"]
    return score.fill(negate(keeps), _read_fill(reader, other), _dtype(op))


def _masked_fill(reader: Reader, op: Op, below: Node, score: Score) -> Score:
    if op.args["self"] is not below:
        raise Unreadable(f"scores are the mask of {op.node.name}")
    dropped = read_truth(reader.read(op.args["mask"]).broadcast(4))
    return score.fill(dropped, _read_fill(reader, op.args["value"]), _dtype(op))


def _read_fill(reader: Reader, argument: object) -> float:
    """The one number that replaces scores."""
    if not holds_tensor(argument):
        return float(read_scalar(argument))
    assert isinstance(argument, Node), "a tensor of the graph is a node"
    return _only_number(reader.read(argument), f"{argument.name} replaces scores")


def _only_number(value: Value, what: str) -> float:
    if isinstance(value.content, tuple) and len(value.content) == 1:
        number = value.content[0].number
        if is_constant(number):
            return float(number)
    raise Unreadable(f"{what}, and it isn't one number")


def _dtype(op: Op) -> torch.dtype:
    value = op.node.meta["val"]
    assert isinstance(value, Tensor), "scores are a tensor"
    return value.dtype


_STEPS: dict[OpOverloadPacket, _Step] = {
    aten.mul: _multiply,
    aten.div: _divide,
    aten.add: _add,
    aten.sub: _subtract,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
}
