"""Ops that treat some dims whole (norms, softmax, sums, slices) and pass the rest."""

from collections.abc import Callable, Iterable

import torch
from torch.fx import Node

from ringcompile.passes.dims import Dims, Factors
from ringcompile.passes.op import Op, shape_of
from ringcompile.passes.rules.flow import Flow, Link
from ringcompile.passes.rules.pointwise import broadcast
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten


def _same_rank(
    op: Op, factors: Factors, operands: list[Dims], *, whole: Iterable[int]
) -> Flow:
    """Dims pass but those in ``whole``, which get new factors where sizes change."""
    shape, rank = shape_of(op.node), op.rank(0)
    sealed = {d % rank for d in whole} if rank else set()
    dims = [
        dim if sizes_equal(size, shape[d]) else factors.new(shape[d])
        for d, (dim, size) in enumerate(
            zip(operands[0], shape_of(op.slots[0]), strict=True)
        )
    ]
    links = set()
    for slot, operand in enumerate(operands):
        for d, size in enumerate(shape_of(op.slots[slot])):
            if d not in sealed and sizes_equal(size, shape[d]):
                factors.unite(dims[d], operand[d])
                links.add(Link(slot, d, d))
    return Flow(tuple(dims), frozenset(links))


def along(argument: str) -> Callable[[Op, Factors, list[Dims]], Flow | None]:
    """A rule for an op that works along the dim(s) in ``argument``."""

    def rule(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
        dim = op.args[argument]
        if dim is None or any(len(o) != len(operands[0]) for o in operands):
            return None
        whole = [dim] if isinstance(dim, int) else dim
        return _same_rank(op, factors, operands, whole=whole)

    return rule


def cat(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Join along a dim; an empty 1-D operand is skipped, as ``torch.cat`` does."""
    full = [s for s, node in enumerate(op.slots) if not _is_empty(node)]
    if not full:
        return None
    dims = operands[full[0]]
    at = op.args["dim"] % len(dims)
    out = list(dims)
    if len(full) > 1:
        out[at] = factors.new(shape_of(op.node)[at])
    links = set()
    for slot in full:
        for d in range(len(dims)):
            if d != at or len(full) == 1:
                factors.unite(out[d], operands[slot][d])
                links.add(Link(slot, d, d))
    return Flow(tuple(out), frozenset(links))


def _is_empty(node: Node) -> bool:
    return shape_of(node) == (0,)


def norm(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Layer and RMS norm: the last dims are whole, weight and bias replicated."""
    count = len(op.args["normalized_shape"])
    rank = op.rank(0)
    return _same_rank(op, factors, operands[:1], whole=range(rank - count, rank))


def reduction(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Sum, mean, amax: the named dims vanish. ``max`` of two tensors is pointwise."""
    if "other" in op.args:
        return broadcast(op, factors, operands)
    rank = op.rank(0)
    gone = reduced_dims(op)
    keepdim = bool(op.args.get("keepdim"))
    dims: list[tuple[int, ...]] = []
    links = set()
    for d in range(rank):
        if d not in gone:
            links.add(Link(0, d, len(dims)))
            dims.append(operands[0][d])
        elif keepdim:
            dims.append(())
    return Flow(tuple(dims), frozenset(links))


def reduced_dims(op: Op) -> set[int]:
    """The dims that a reduction sums over; all of them when none is named."""
    rank, dim = op.rank(0), op.args.get("dim")
    if dim is None or dim == []:
        return set(range(rank))
    named = [dim] if isinstance(dim, int) else dim
    return {d % rank for d in named} if rank else set()


def slice_(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """A slice that keeps everything passes all dims."""
    sizes, shape = shape_of(op.slots[0]), shape_of(op.node)
    dim = op.args["dim"]
    keeps_all = sizes_equal(sizes[dim], shape[dim]) and op.args["step"] == 1
    return _same_rank(op, factors, operands, whole=[] if keeps_all else [dim])


def select(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """One index of a dim, which vanishes."""
    rank = op.rank(0)
    gone = op.args["dim"] % rank
    order = [d for d in range(rank) if d != gone]
    links = {Link(0, d, i) for i, d in enumerate(order)}
    return Flow(tuple(operands[0][d] for d in order), frozenset(links))


def pad(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Dims that the padding leaves alone pass."""
    rank = op.rank(0)
    amounts = op.args["pad"]
    touched = {
        rank - 1 - i // 2
        for i, n in enumerate(amounts)
        if not (n == 0 and type(n) is int)
    }
    return _same_rank(op, factors, operands, whole=touched)


def stack(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """A new dim, the others pass."""
    rank = op.rank(0)
    at = op.args["dim"] % (rank + 1)
    links = set()
    for slot, operand in enumerate(operands):
        for d in range(rank):
            factors.unite(operands[0][d], operand[d])
            links.add(Link(slot, d, d + (d >= at)))
    dims = list(operands[0])
    dims.insert(at, factors.new(shape_of(op.node)[at]))
    return Flow(tuple(dims), frozenset(links))


def creation(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """A constant of a given size: any dim can be made at the shard's size."""
    dims = factors.new_dims(shape_of(op.node))
    return Flow(dims, frozenset(), sizes="size", is_constant=True)


def batch_norm(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """By stored statistics each element is alone; channels are dim 1."""
    rank = op.rank(0)
    links = set()
    if not op.args["training"]:
        links = {Link(0, d, d) for d in range(rank) if d != 1}
    return Flow(operands[0], frozenset(links))


def group_norm(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Group and instance norm: all but the batch is taken together."""
    return Flow(operands[0], frozenset({Link(0, 0, 0)}))


RULES = {
    aten.softmax: along("dim"),
    aten._softmax: along("dim"),  # noqa: SLF001
    aten.log_softmax: along("dim"),
    aten._log_softmax: along("dim"),  # noqa: SLF001
    aten.cumsum: along("dim"),
    aten.cumprod: along("dim"),
    aten.diff: lambda op, f, o: along("dim")(op, f, o) if len(o) == 1 else None,
    aten.flip: along("dims"),
    aten.roll: lambda op, f, o: along("dims")(op, f, o) if op.args["dims"] else None,
    aten.glu: along("dim"),
    aten.topk: along("dim"),
    aten.sort: along("dim"),
    aten.argsort: along("dim"),
    aten.cat: cat,
    aten.split: along("dim"),
    aten.split_with_sizes: along("dim"),
    aten.chunk: along("dim"),
    aten.narrow: along("dim"),
    aten.gather: along("dim"),
    aten.layer_norm: norm,
    aten.rms_norm: norm,
    aten.batch_norm: batch_norm,
    aten.group_norm: group_norm,
    aten.instance_norm: group_norm,
    aten.sum: reduction,
    aten.mean: reduction,
    aten.amax: reduction,
    aten.amin: reduction,
    aten.max: reduction,
    aten.min: reduction,
    aten.argmax: reduction,
    aten.argmin: reduction,
    aten.var: reduction,
    aten.std: reduction,
    aten.var_mean: reduction,
    aten.std_mean: reduction,
    aten.linalg_vector_norm: reduction,
    aten.nansum: reduction,
    aten.count_nonzero: reduction,
    aten.logsumexp: reduction,
    aten.prod: reduction,
    aten.any: reduction,
    aten.all: reduction,
    aten.slice: slice_,
    aten.select: select,
    aten.pad: pad,
    aten.constant_pad_nd: pad,
    aten.stack: stack,
    aten.zeros: creation,
    aten.ones: creation,
    aten.full: creation,
    aten.new_zeros: creation,
    aten.new_ones: creation,
    aten.new_full: creation,
}
