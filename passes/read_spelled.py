"""Read an attention that is spelled out: product, scale, masks, softmax, product."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from sympy import Expr
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.fx import Node

from ringcompile.ir.mask import negate
from ringcompile.passes.coordinates import COLUMN, ROW, Grid, align, climb
from ringcompile.passes.find_softmax import Spelled, hides, moves_elements
from ringcompile.passes.op import Op, read_op, shape_of
from ringcompile.passes.operands import (
    NOT_FOLLOWED,
    PRODUCTS,
    Rows,
    find_heads,
    find_operands,
)
from ringcompile.passes.parts import Parts, Refused, check_dropout, check_lengths
from ringcompile.passes.read_added import (
    REPLACES,
    add_tensor,
    read_condition,
    read_number,
)
from ringcompile.passes.read_factor import read_factor
from ringcompile.passes.read_score import Score
from ringcompile.passes.read_sink import add_sink
from ringcompile.passes.read_softmax import is_own_max
from ringcompile.passes.read_values import Reader
from ringcompile.passes.read_zeros import drop_zeros, settle_refilled
from ringcompile.passes.symbolic import Unreadable
from ringcompile.passes.value_scalars import holds_tensor, read_scalar
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Step:
    """One op on the way from Q.K to the softmax.

    Attributes:
        reader: reads the graph.
        op: the op.
        below: the operand that holds the scores so far.
        index: of the result's elements.
        grid: batch and heads.
    """

    reader: Reader
    op: Op
    below: Node
    index: Sequence[Expr]
    grid: Grid

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        value = self.op.node.meta["val"]
        assert isinstance(value, Tensor), "scores are a tensor"
        return value.dtype

    def truth(self, name: str) -> Boolean:
        """Where a bool operand holds, over ``i0 .. i3``."""
        return read_condition(self.reader, self.op.args[name], self.index)


def read_spelled(reader: Reader, spelled: Spelled) -> Parts:
    """Read operands and score of an attention spelled out.

    Raises:
        Refused: for an op on the way that no ring carries.
        Unreadable: for a mask that isn't a function of positions.
    """
    _check_weights(spelled)
    _check_way(reader, spelled)
    output = spelled.outputs[0]
    dropout = _read_dropout(spelled)
    result = _read_result(spelled, output)
    way_out = list(_climb_to_softmax(spelled, result))
    index = way_out[-1][1]
    _check_softmax(spelled, index)
    way = list(_climb_to_product(spelled, index, result.grid))
    product, at = way[-1]
    q, k = _read_factors(product, at, result.grid)
    check_lengths(q.length, k.length, result.v.length)
    score = _read_scale(Step(reader, _op(product), product, at, result.grid))
    for (below, _), (node, here) in pairwise(way[::-1]):
        step = Step(reader, _op(node), below, here, result.grid)
        score = _read_step(step, score)
    score = _finish_score(spelled, score, reader, index)
    _check_keys(spelled, score, result, q)
    dtype = output.meta["val"].dtype
    # Autocast gives the product of wider operands the dtype of the result.
    is_cast = product.meta["val"].dtype == dtype
    operands = find_operands(
        reader, (q, k, result.v), result.grid, dtype, is_cast=is_cast
    )
    score = score.cast(spelled.softmax.weights.meta["val"].dtype)
    shape = (result.grid.batch, result.grid.heads, q.length, k.length)
    parts = Parts(
        *(output, shape, *operands, score, spelled.softmax.infinite, dropout),
        transposed=result.transposed,
    )
    filled = [
        (op, *way_out[i + 1][:1], at)
        for i, (node, at) in enumerate(way_out[:-1])
        if hides(op := _op(node), way_out[i + 1][0])
    ]
    return settle_refilled(parts, filled, reader)


def _op(node: Node) -> Op:
    op = read_op(node)
    assert op is not None, "the way leads over ops"
    return op


# ---- from the result up to the softmax -----------------------------------------------


@dataclass(frozen=True, slots=True)
class _Result:
    """The product of weights and V.

    Attributes:
        weights: the operand that the weights are, up to views.
        index: of its elements.
        v: the other operand.
        grid: batch and heads.
        transposed: whether it is ``(..., E, S)``: V's transpose times the weights.
    """

    weights: Node
    index: Sequence[Expr]
    v: Rows
    grid: Grid
    transposed: bool


def _read_result(spelled: Spelled, output: Node) -> _Result:
    op = _op(output)
    if op.packet not in {aten.matmul, aten.bmm}:
        raise Refused(
            f"attention whose result is made by {op.packet}",
            because="what it adds to weights @ V isn't carried",
            instead="write weights @ V",
        )
    left, right = op.slots
    on_left = left in (spelled.softmax.weights, *spelled.way_out)
    weights, v = (left, right) if on_left else (right, left)
    if len(shape_of(v)) == 1:
        raise Refused(
            "attention with a V of one dim",
            because="a ring carries rows of features",
            instead="give V a dim of features of size 1",
        )
    grid = _find_grid(spelled, output)
    if grid.flat is not None and not on_left:
        raise Unreadable("heads and queries are laid end to end, behind features")
    matrix = [grid.row, COLUMN] if on_left else [COLUMN, grid.row]
    lead = grid.full(output)
    index = align(shape_of(weights), [*lead, *matrix])
    rows = Rows.of(v, align(shape_of(v)[:-2], lead), transposed=not on_left)
    return _Result(weights, index, rows, grid, transposed=not on_left)


def _find_grid(spelled: Spelled, output: Node) -> Grid:
    lead = shape_of(output)[:-2]
    if len(lead) != 1:
        return Grid.of(lead)
    for node in (*spelled.way_down, *spelled.way_out):
        batch, *heads = shape_of(node)[:-2]
        is_split = len(heads) == 1 and isinstance(heads[0], int)
        if is_split and sizes_equal(batch * heads[0], lead[0]):
            return Grid.of(lead, heads[0])
        if is_split and sizes_equal(batch, lead[0]) and _is_flat(node, output):
            return Grid(batch, heads[0], Grid.of(lead).lead, shape_of(node)[2])
    operands = [*_op(spelled.way_down[0]).slots[-2:], *_op(output).slots]
    return Grid.of(lead, find_heads(operands, lead))


def _is_flat(scores: Node, output: Node) -> bool:
    """Whether rows of the output are heads and queries of scores, laid end to end.

    As many queries as keys: the rows and columns of a picture are no heads.
    """
    _, heads, queries, keys = shape_of(scores)
    known = all(isinstance(n, int) for n in (heads, queries, keys))
    return known and queries == keys and heads * queries == shape_of(output)[-2]


def _climb_to_softmax(
    spelled: Spelled, result: _Result
) -> Iterator[tuple[Node, Sequence[Expr]]]:
    """Every node from the weights up to the softmax's result, and its index."""
    node, index = result.weights, result.index
    while node is not spelled.softmax.weights:
        yield node, index
        op = _op(node)
        above = next(n for n in op.slots if _is_weights(spelled, n))
        index = climb(op, above, index, result.grid)
        node = above
    yield node, index


def _is_weights(spelled: Spelled, node: Node) -> bool:
    return node in (spelled.softmax.weights, *spelled.way_out)


def _climb_to_product(
    spelled: Spelled, index: Sequence[Expr], grid: Grid
) -> Iterator[tuple[Node, Sequence[Expr]]]:
    """Every node from the softmax's scores up to Q.K, and its index."""
    node = spelled.softmax.scores
    for above in spelled.way_down[-2::-1]:
        yield node, index
        op = _op(node)
        if op.packet is not aten.cat:  # whose first part starts where it starts
            index = climb(op, above, index, grid)
        node = above
    yield node, index


def _check_softmax(spelled: Spelled, index: Sequence[Expr]) -> None:
    """It must be over the keys, and its rows must be the queries."""
    dim = spelled.softmax.dim
    over = [d for d, e in enumerate(index) if e.has(COLUMN)]
    if over != [dim] or index[dim] != COLUMN or ROW not in index:
        raise Refused(
            f"attention with a softmax over dim {dim} of {len(index)}",
            because="a query's weights must sum to 1 over its keys",
            instead="take the softmax over the dim of keys",
        )


def _finish_score(
    spelled: Spelled, score: Score, reader: Reader, index: Sequence[Expr]
) -> Score:
    """What a softmax that is spelled out does to exps before it divides them."""
    softmax = spelled.softmax
    if softmax.masked is not None:
        score = drop_zeros(reader, softmax.masked, index, score)
    return score if softmax.sink is None else score.sink(softmax.sink)


def _check_keys(spelled: Spelled, score: Score, result: "_Result", q: Rows) -> None:
    """All weights, but the sink's, must reach V, and all queries the result."""
    size = shape_of(spelled.softmax.weights)[spelled.softmax.dim]
    keys = result.v.length + isinstance(score.sinks, Node)
    rows = shape_of(spelled.outputs[0])[-1 if result.transposed else -2]
    queries = q.length if result.grid.flat is None else q.length * result.grid.heads
    if not (sizes_equal(size, keys) and sizes_equal(rows, queries)):
        raise Refused(
            f"attention with a softmax over {size} scores, {keys} of them used, for"
            f" {q.length} queries, {rows} of them used",
            because="what is left out isn't carried",
            instead="use the weights of all keys and queries",
        )


def _read_factors(
    product: Node, index: Sequence[Expr], grid: Grid
) -> tuple[Rows, Rows]:
    """Q and K of a product of scores, either way round."""
    op = _op(product)
    if op.packet not in PRODUCTS:
        raise Refused(
            f"attention spelled with {op.packet}",
            because="its scores can't be read as products of a Q and a K",
            instead="spell it with torch.matmul, or call scaled_dot_product_attention",
        )
    left, right = op.slots[-2:]
    *lead, row, column = index
    leads = [align(shape_of(x)[:-2], lead) for x in (left, right)]
    if any(e.has(ROW, COLUMN) for e in lead):
        raise Unreadable("queries or keys run along a dim of the batch")
    first = Rows.of(left, leads[0], transposed=False)
    second = Rows.of(right, leads[1], transposed=True)
    if grid.flat is not None and (row, column) == (grid.row, COLUMN):
        flat = [*leads[0], *align(shape_of(left)[-2:], [row, COLUMN])]
        return Rows(left, flat, grid.flat, first.features), second
    if (row, column) == (ROW, COLUMN):
        return first, second
    if (row, column) == (COLUMN, ROW):
        return second, first
    raise Refused(
        f"attention whose scores {list(shape_of(product))} are shuffled before V",
        because=f"row {row} and column {column} of {product.name} are no query and key",
        instead="keep scores (batch, heads, queries, keys) up to the softmax",
    )


# ---- uses of the weights -------------------------------------------------------------


def _check_weights(spelled: Spelled) -> None:
    if len(spelled.outputs) > 1 or spelled.strangers:
        others = [n.name for n in (*spelled.strangers, *spelled.outputs[1:])]
        raise Refused(
            f"attention whose weights are also used by {', '.join(others)}",
            because="a ring never holds the weights of all keys at once",
            instead="don't return or change the weights (output_attentions=False)",
        )
    totals = [n for n in spelled.softmax.scores.users if _is_total(n)]
    if totals and not spelled.softmax.inside:
        raise Refused(
            f"attention whose scores are also used by {totals[0].target}",
            because="a ring never holds the scores of all keys at once",
            instead="don't ask for the lse or the greatest score (return_aux)",
        )


def _is_total(node: Node) -> bool:
    op = read_op(node)
    return op is not None and op.packet in {aten.logsumexp, aten.amax}


def _check_way(reader: Reader, spelled: Spelled) -> None:
    """Refuse what stops gradients or writes to scores on the way to V."""
    way = (*spelled.way_down, *spelled.softmax.inside, *spelled.way_out)
    stopped = [n.name for n in way if reader.is_mutated(n) or _keeps_gradient(n)]
    if stopped:
        raise Refused(
            f"attention whose scores or weights go through {', '.join(stopped)}",
            because="they are changed in place, or keep gradients back",
            instead="compute scores without in-place ops and detach",
        )


def _keeps_gradient(node: Node) -> bool:
    op = read_op(node)
    return op is not None and op.packet in NOT_FOLLOWED


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


# ---- from Q.K down to the softmax ----------------------------------------------------


def _read_scale(step: Step) -> Score:
    """What a product of scores multiplies with and adds."""
    op = step.op
    if op.packet is not aten.baddbmm:
        return Score(1.0, dtype=step.dtype)
    score = Score(float(read_scalar(op.args["alpha"])), dtype=step.dtype)
    beta = float(read_scalar(op.args["beta"]))
    if beta == 0:
        return score
    node = op.args["self"]
    return add_tensor(step.reader, node, step, score, factor=beta)


def _read_step(step: Step, score: Score) -> Score:
    """What an op does to the scores of its operand."""
    op = step.op
    if op.packet in _STEPS:
        return _STEPS[op.packet](step, score)
    is_first = bool(op.slots) and op.slots[0] is step.below
    if op.packet is not aten.dropout and is_first and moves_elements(op):
        return score.cast(step.dtype)
    raise Refused(
        f"attention whose scores go through {op.node.target}",
        because="a ring carries scale, softcap, biases, masks and sinks of scores only",
        instead="change scores by these alone",
    )


def _multiply(step: Step, score: Score) -> Score:
    return _scale(step, score, divides=False)


def _divide(step: Step, score: Score) -> Score:
    op = step.op
    if op.args["self"] is not step.below or op.args.get("rounding_mode") is not None:
        raise Unreadable(f"{op.node.name} divides by scores or rounds them")
    return _scale(step, score, divides=True)


def _scale(step: Step, score: Score, *, divides: bool) -> Score:
    """Scores multiplied with a number, or with a tensor that keys don't vary."""
    op = step.op
    others = [
        op.args[name] for name in ("self", "other") if op.args[name] is not step.below
    ]
    if len(others) != 1:
        raise Unreadable(f"{op.node.name} multiplies scores with themselves")
    try:
        number = read_number(step.reader, others[0], "scales scores")
    except Unreadable:
        if not holds_tensor(others[0]):
            raise
        return score.multiply_by(read_factor(step, others[0], divides=divides))
    return score.multiply(1.0 / number if divides else number, step.dtype)


def _add(step: Step, score: Score) -> Score:
    op = step.op
    if not holds_tensor(op.args["other"]) and read_scalar(op.args["other"]) == 0:
        return score
    return _add_other(step, score, sign=1.0)


def _subtract(step: Step, score: Score) -> Score:
    op = step.op
    is_first = op.args["self"] is step.below
    if is_first and is_own_max(op, list(step.index).index(COLUMN)):
        return score.shift()
    return _add_other(step, score, sign=-1.0)


def _add_other(step: Step, score: Score, *, sign: float) -> Score:
    """``self + sign * alpha * other``, of which one is the scores."""
    op = step.op
    others = [n for n in op.slots if n is not step.below]
    factor = sign * float(read_scalar(op.args.get("alpha", 1)))
    if len(others) != 1:
        raise Unreadable(f"{op.node.name} adds scores to scores, or a number")
    if op.args["other"] is not step.below:
        return add_tensor(step.reader, others[0], step, score, factor=factor)
    if factor != 1:
        score = score.multiply(factor, step.dtype)
    return add_tensor(step.reader, others[0], step, score)


def _where(step: Step, score: Score) -> Score:
    keeps = step.truth("condition")
    other = step.op.args["other"]
    if step.op.args["self"] is not step.below:
        keeps, other = negate(keeps), step.op.args["self"]
    number = read_number(step.reader, other, REPLACES)
    return score.fill(negate(keeps), number, step.dtype)


def _masked_fill(step: Step, score: Score) -> Score:
    if step.op.args["self"] is not step.below:
        raise Unreadable(f"scores are the mask of {step.op.node.name}")
    number = read_number(step.reader, step.op.args["value"], REPLACES)
    return score.fill(step.truth("mask"), number, step.dtype)


def _raise(step: Step, score: Score) -> Score:
    others = [n for n in step.op.slots if n is not step.below]
    if step.op.overload not in _GREATER or len(others) != 1:
        raise Unreadable(f"{step.op.node.name} takes the greatest of scores")
    return score.at_least(read_number(step.reader, others[0], REPLACES))


_GREATER = (aten.max.other, aten.maximum.default)


def _tanh(_step: Step, score: Score) -> Score:
    return score.take_tanh()


def _sink(step: Step, score: Score) -> Score:
    return add_sink(step, step.below, score)


_STEPS: dict[OpOverloadPacket, Callable[[Step, Score], Score]] = {
    aten.mul: _multiply,
    aten.div: _divide,
    aten.add: _add,
    aten.sub: _subtract,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.max: _raise,
    aten.maximum: _raise,
    aten.tanh: _tanh,
    aten.cat: _sink,
}
