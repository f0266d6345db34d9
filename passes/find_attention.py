"""Find the attentions of a flat ATen graph, by data flow, whatever their spelling.

``scaled_dot_product_attention`` is one node; a spelled-out attention is a softmax whose
weights reach a product with V and whose scores come from a product of Q and K. What is
found becomes a ``Region``, or a ``Refusal`` if it can't be a ring. Invariants: every
argument of every op on the way is carried or refused by name; a softmax whose scores do
not run over tokens on both sides is no attention and is not reported.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.fx import Graph, GraphModule, Node

from ringcompile.ir.mask import EmptyRow, Mask, at_least_zero, negate
from ringcompile.passes.find_softmax import find_spelled
from ringcompile.passes.op import Op, read_op, shape_of
from ringcompile.passes.operands import find_operands
from ringcompile.passes.parts import Parts, Refused, check_dropout, check_operands
from ringcompile.passes.read_mask import MaskReader
from ringcompile.passes.read_score import Score
from ringcompile.passes.read_spelled import read_spelled
from ringcompile.passes.read_values import Reader
from ringcompile.passes.regions import Refusal, Region
from ringcompile.passes.sequences import mark_cross
from ringcompile.passes.shadow import where
from ringcompile.passes.symbolic import Unreadable, index_symbol, read_truth
from ringcompile.passes.value_scalars import read_scalar

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
    q_shape = shape_of(parts.q.node)
    lengths = (shape_of(o.node)[o.sequence_dim] for o in (parts.q, parts.k))
    read = masks.read_mask(parts.score.keeps, (*q_shape[:2], *lengths))
    empty_row = EmptyRow.ZERO
    if read.may_be_empty:
        empty_row = _find_empty_row(parts)
    if parts.dropout and empty_row in {EmptyRow.MEAN_ALL, EmptyRow.MEAN_FILLED}:
        raise Refused(
            f"attention with dropout p={parts.dropout} of its weights",
            because="a query may have no key, and finfo.min then gives it the mean of "
            "all values, of which some would be dropped",
            instead="a bool mask, or one that keeps a key for each query",
        )
    seeds = 1 if parts.dropout else 0
    return Region(
        output=parts.output,
        q=parts.q,
        k=parts.k,
        v=parts.v,
        scale=parts.score.scale,
        mask=Mask(read.keeps, len(read.captures) + seeds, empty_row),
        captures=read.captures,
        where=where(parts.output),
        dropout=parts.dropout,
    )


def _find_empty_row(parts: Parts) -> EmptyRow:
    if parts.infinite is None:
        raise Refused(
            "attention with a softmax spelled as exp and sum",
            because="a query may have no key, and what it then gives is left to chance",
            instead="call torch.softmax, or keep at least one key for each query",
        )
    return parts.score.empty_row(parts.infinite)


# ---- scaled_dot_product_attention ----------------------------------------------------


def _read_sdpa(reader: Reader, op: Op) -> Parts:
    """Read every argument; a query with only -inf scores gives 0 (by experiment)."""
    q, k, v = (op.args[name] for name in ("query", "key", "value"))
    check_operands(op.node, q, k, v)
    dropout = check_dropout(float(read_scalar(op.args["dropout_p"])))
    heads, kv_heads = shape_of(q)[1], shape_of(k)[1]
    if not op.args["enable_gqa"] and kv_heads not in (1, heads):
        raise Refused(
            f"attention of {heads} query heads over {kv_heads} heads of K",
            because="heads are broadcast without enable_gqa",
            instead="pass enable_gqa=True, or as many heads of K and V as of Q",
        )
    score = _read_sdpa_score(reader, op)
    operands = find_operands(reader, q, k, v)
    return Parts(op.node, *operands, score, EmptyRow.ZERO, dropout)


def _read_sdpa_score(reader: Reader, op: Op) -> Score:
    features = shape_of(op.args["query"])[3]
    given = op.args["scale"]
    dtype = op.node.meta["val"].dtype
    scale = float(features) ** -0.5 if given is None else float(read_scalar(given))
    score = Score(scale, dtype=dtype)
    if op.args["is_causal"]:
        ahead = at_least_zero(index_symbol(3) - index_symbol(2) - 1)
        score = score.fill(ahead, -math.inf, dtype)
    if op.args["attn_mask"] is None:
        return score
    mask = reader.read(op.args["attn_mask"])
    if mask.dtype is not torch.bool:
        return score.add(mask, dtype)
    dropped = negate(read_truth(mask.broadcast(4)))
    return score.fill(dropped, -math.inf, dtype)
