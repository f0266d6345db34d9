"""Find the attentions of a flat ATen graph, by data flow, whatever their spelling.

``scaled_dot_product_attention`` is one node; a spelled-out attention is a softmax whose
weights reach a product with V and whose scores come from a product of Q and K. What is
found becomes a ``Region``, or a ``Refusal`` if it can't be a ring. Invariants: every
argument of every op on the way is carried or refused by name; a softmax whose scores do
not run over tokens on both sides is no attention and is not reported.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import sympy
import torch
from sympy import Expr
from torch import SymInt
from torch.fx import Graph, GraphModule, Node

from ringcompile.ir.mask import EmptyRow, Mask, at_least_zero, negate
from ringcompile.passes.coordinates import COLUMN, HEAD, ROW, Grid, align
from ringcompile.passes.find_softmax import find_spelled
from ringcompile.passes.op import Op, read_op, shape_of
from ringcompile.passes.operands import Rows, find_heads, find_operands
from ringcompile.passes.parts import Parts, Refused, check_dropout, check_lengths
from ringcompile.passes.places import where
from ringcompile.passes.read_added import (
    add_tensor,
    find_bias,
    may_hide,
    read_condition,
)
from ringcompile.passes.read_factor import find_factor
from ringcompile.passes.read_mask import MaskReader
from ringcompile.passes.read_score import Score, hides_all
from ringcompile.passes.read_spelled import read_spelled
from ringcompile.passes.read_values import Reader
from ringcompile.passes.regions import BiasOperand, Refusal, Region
from ringcompile.passes.sequences import mark_cross
from ringcompile.passes.symbolic import Size, Unreadable
from ringcompile.passes.value_scalars import read_scalar
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten

_ReadParts = Callable[[], Parts]


def find_attention(gm: GraphModule) -> tuple[Region | Refusal, ...]:
    """Find every attention of a flat ATen graph, in graph order.

    Args:
        gm: a graph of ``trace_shadow``; left as it is.
    """
    reader = Reader(gm.graph)
    masks = MaskReader(reader)
    found = [
        _settle(masks, output, read_parts)
        for output, read_parts in _find_candidates(gm.graph, reader)
    ]
    return mark_cross(sorted(found, key=lambda f: reader.place_of(f.output)))


def _find_candidates(graph: Graph, reader: Reader) -> Iterator[tuple[Node, _ReadParts]]:
    for node in graph.nodes:
        op = read_op(node)
        if op is not None and op.packet is aten.scaled_dot_product_attention:
            yield node, partial(_read_sdpa, reader, op)
    for spelled in find_spelled(graph):
        yield spelled.outputs[0], partial(read_spelled, reader, spelled)


def _settle(
    masks: MaskReader, output: Node, read_parts: _ReadParts
) -> Region | Refusal:
    try:
        return _build_region(masks, read_parts())
    except Refused as refused:
        return Refusal(
            output, refused.what, refused.because, refused.instead, where(output)
        )
    except Unreadable as unreadable:
        return Refusal(
            output,
            "attention with a mask or bias that isn't a function of positions",
            unreadable.because,
            "build the mask from positions, a (batch, sequence) integer or bool tensor,"
            " or both; keep keys with 0 and drop them with False, -inf or"
            " torch.finfo(dtype).min",
            where(output),
        )


def _build_region(masks: MaskReader, parts: Parts) -> Region:
    score = parts.score
    read = masks.read_mask(score.keeps, parts.shape)
    empty_row = _find_empty_row(parts, may_be_empty=read.may_be_empty)
    if parts.dropout and empty_row in _MEANS:
        raise Refused(
            f"attention with dropout p={parts.dropout} of its weights",
            because="a query may have no key, and finfo.min then gives it the mean of "
            "all values, of which some would be dropped",
            instead="a bool mask, or one that keeps a key for each query",
        )
    grid = Grid(parts.shape[0], parts.shape[1], ())
    biases = tuple(find_bias(term, parts.shape, grid) for term in score.biases)
    _check_biases(biases, score)
    is_capped = score.cap is not None
    seeds = 1 if parts.dropout else 0
    return Region(
        output=parts.output,
        q=parts.q,
        k=parts.k,
        v=parts.v,
        scale=score.scale * score.cap if score.cap is not None else score.scale,
        mask=Mask(read.keeps, len(read.captures) + seeds, empty_row),
        captures=read.captures,
        where=where(parts.output),
        dropout=parts.dropout,
        transposed=parts.transposed,
        softcap=score.cap if is_capped else None,
        biases=biases,
        sinks=score.sinks,
        factors=tuple(find_factor(f, parts.shape, grid) for f in score.factors),
    )


def _check_biases(biases: Sequence[BiasOperand], score: Score) -> None:
    """Where all keys that a query sees have a low bias, those dropped count too."""
    numbers = [d.number for d in score.drops if d.number != -math.inf]
    if not numbers:
        return
    moderate = [n for n in numbers if not hides_all(n, score.dtype)]
    above = -max(moderate) / _MARGIN if moderate else math.inf
    hiding = [
        bias.node.name
        for bias in biases
        if abs(bias.factor) > above or may_hide(bias.node, above)
    ]
    if hiding:
        low = max(moderate) if moderate else "finfo.min"
        raise Refused(
            f"attention with the float mask {hiding[0]} and keys dropped by {low}",
            because="a query whose keys the mask hides would then see the dropped ones",
            instead="a bool mask, or -inf for the keys that are dropped",
        )


_MARGIN = 100  # what a bias may be at most, as a share of what drops keys
_MEANS = (EmptyRow.MEAN_ALL, EmptyRow.MEAN_FILLED)


def _find_empty_row(parts: Parts, *, may_be_empty: bool) -> EmptyRow:
    """What a query gives that has no key, or only keys whose bias is -inf."""
    if parts.score.sinks is not None or not (may_be_empty or parts.score.biases):
        return EmptyRow.ZERO  # a sink is a key
    if parts.empty_row is not None:
        return parts.empty_row
    if parts.infinite is None:
        raise Refused(
            "attention with a softmax spelled as exp and sum, or weights masked again",
            because="a query may have no key, and what it then gives is left to chance",
            instead="call torch.softmax alone, or keep at least one key for each query",
        )
    return parts.score.empty_row(parts.infinite) if may_be_empty else parts.infinite


# ---- scaled_dot_product_attention ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a mask is added to scores inside the op."""

    index: Sequence[Expr]
    grid: Grid
    dtype: torch.dtype


def _read_sdpa(reader: Reader, op: Op) -> Parts:
    """Read every argument; a query with only -inf scores gives 0 (by experiment)."""
    q, k, v = (op.args[name] for name in ("query", "key", "value"))
    dropout = check_dropout(float(read_scalar(op.args["dropout_p"])))
    if op.args["enable_gqa"]:
        _settle_heads(q, k)
    lead = shape_of(op.node)[:-2]
    heads = 1
    if len(lead) == 1:
        heads = find_heads((q, k, v), lead)
    grid = Grid.of(lead, heads)
    q_rows, k_rows, v_rows = (
        Rows.of(x, _read_lead(op, x, grid), transposed=False) for x in (q, k, v)
    )
    rows = (q_rows, k_rows, v_rows)
    lengths = tuple(x.length for x in rows)
    check_lengths(*lengths)
    place = _Place([*grid.full(op.node), ROW, COLUMN], grid, op.node.meta["val"].dtype)
    score = _read_sdpa_score(reader, op, place)
    operands = find_operands(reader, rows, grid, place.dtype, is_cast=True)
    shape = (grid.batch, grid.heads, lengths[0], lengths[1])
    return Parts(op.node, shape, *operands, score, EmptyRow.ZERO, dropout)


def _settle_heads(q: Node, k: Node) -> None:
    """Guard numbers of heads, unless alike: how many share one must be known."""
    for ours, theirs in zip(shape_of(q)[1:-2], shape_of(k)[1:-2], strict=False):
        if not sizes_equal(ours, theirs):
            int(ours), int(theirs)  # which guards them


def _read_lead(op: Op, node: Node, grid: Grid) -> list[Expr]:
    """The index into an operand's leading dims; ``enable_gqa`` repeats its heads."""
    lead = shape_of(node)[:-2]
    index = align(shape_of(node), [*grid.full(op.node), ROW, COLUMN])[: len(lead)]
    if not op.args["enable_gqa"] or len(lead) != 2:  # noqa: PLR2004 - (B, G)
        return index
    shared = _count_shared(lead[1], grid.heads)
    if shared is None:
        raise Refused(
            f"attention of {grid.heads} query heads over {lead[1]} heads of K",
            because="enable_gqa needs a multiple",
            instead="a multiple of K's heads",
        )
    return [index[0], sympy.floor(HEAD / shared) if index[1] != 0 else index[1]]


def _count_shared(own: Size, heads: Size) -> int | None:
    """How many query heads use one of ``own``; None if that is no known number."""
    if sizes_equal(own, heads):
        return 1
    if isinstance(own, SymInt) or isinstance(heads, SymInt) or heads % own:
        return None
    return heads // own


def _read_sdpa_score(reader: Reader, op: Op, place: _Place) -> Score:
    features = shape_of(op.args["query"])[-1]
    given = op.args["scale"]
    scale = float(features) ** -0.5 if given is None else float(read_scalar(given))
    score = Score(scale, dtype=place.dtype)
    if op.args["is_causal"]:
        ahead = at_least_zero(COLUMN - ROW - 1)
        score = score.fill(ahead, -math.inf, place.dtype)
    mask = op.args["attn_mask"]
    if mask is None:
        return score
    if mask.meta["val"].dtype is not torch.bool:
        return add_tensor(reader, mask, place, score)
    dropped = negate(read_condition(reader, mask, place.index))
    return score.fill(dropped, -math.inf, place.dtype)
