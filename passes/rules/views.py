"""Ops that only rearrange: their dims map one to one, whole factors at a time."""

from dataclasses import replace

import torch

from ringcompile.passes.dims import Dims, Factors
from ringcompile.passes.op import Op, shape_of
from ringcompile.passes.rules.flow import Flow, Link
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten


def view(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Lay the factors end to end and cut them anew."""
    if "dtype" in op.args:  # a bitcast
        return None
    dims = factors.view(operands[0], shape_of(op.node))
    where = {factor: d for d, dim in enumerate(dims) for factor in dim}
    links = {
        Link(0, d, where[factor])
        for d, dim in enumerate(operands[0])
        for factor in dim
        if factor in where
    }
    return Flow(dims, frozenset(links), is_view=True)


def view_as(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """A view with the sizes of another tensor, of which only the sizes count."""
    flow = view(op, factors, operands)
    assert flow is not None, "a view to a shape has a flow"
    links = set(flow.links)
    passed = {factor for dim in operands[0] for factor in dim}
    for d, dim in enumerate(operands[1]):
        if passed.issuperset(flow.dims[d]):  # else the view itself is not local here
            factors.unite(flow.dims[d], dim)
        links.add(Link(1, d, d))
    return replace(flow, links=frozenset(links))


def expand(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Repeat dims of size 1; others pass."""
    shape, sizes = shape_of(op.node), shape_of(op.slots[0])
    offset = len(shape) - len(sizes)
    dims = [factors.new(size) for size in shape]
    links = set()
    for d, dim in enumerate(operands[0]):
        if sizes_equal(sizes[d], shape[d + offset]):
            dims[d + offset] = dim
            links.add(Link(0, d, d + offset))
    return Flow(tuple(dims), frozenset(links), sizes="size")


def expand_as(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """``expand`` to the sizes of another tensor, of which only the sizes count."""
    flow = expand(op, factors, operands)
    assert flow is not None, "an expand passes something"
    shape = shape_of(op.node)
    dims, links = list(flow.dims), set(flow.links)
    passed = {link.result_dim for link in links}
    for d, dim in enumerate(operands[1]):
        if d in passed:
            factors.unite(dims[d], dim)
        elif sizes_equal(shape_of(op.slots[1])[d], shape[d]):
            dims[d] = dim
        links.add(Link(1, d, d))
    return Flow(tuple(dims), frozenset(links))


def _moved(operands: list[Dims], order: list[int]) -> Flow:
    """``order[i]`` is the operand dim that becomes result dim ``i``."""
    dims = operands[0]
    links = {Link(0, d, i) for i, d in enumerate(order)}
    return Flow(tuple(dims[d] for d in order), frozenset(links))


def permute(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Reorder dims."""
    rank = op.rank(0)
    return _moved(operands, [d % rank for d in op.args["dims"]])


def movedim(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Move some dims to new places; the others keep their order."""
    rank = op.rank(0)
    source, target = op.args["source"], op.args["destination"]
    if isinstance(source, int):
        source, target = [source], [target]
    taken = {t % rank: s % rank for s, t in zip(source, target, strict=True)}
    rest = iter(d for d in range(rank) if d not in taken.values())
    return _moved(
        operands, [taken.get(i, -1) if i in taken else next(rest) for i in range(rank)]
    )


def transpose(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Swap two dims."""
    order = list(range(op.rank(0)))
    if order:
        _, a, b = op.args.values()
        order[a], order[b] = order[b], order[a]
    return _moved(operands, order)


def swap_last(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """``t``, ``mT``: swap the last two dims."""
    order = list(range(op.rank(0)))
    if len(order) > 1:
        order[-1], order[-2] = order[-2], order[-1]
    return _moved(operands, order)


def reverse(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """``T``: all dims in reverse."""
    return _moved(operands, list(range(op.rank(0)))[::-1])


def unsqueeze(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Insert a dim of size 1."""
    at = op.args["dim"] % (op.rank(0) + 1)
    dims = list(operands[0])
    dims.insert(at, ())
    links = {Link(0, d, d + (d >= at)) for d in range(op.rank(0))}
    return Flow(tuple(dims), frozenset(links))


def squeeze(op: Op, factors: Factors, operands: list[Dims]) -> Flow | None:
    """Drop dims of size 1."""
    if "dim" not in op.args:
        return None
    named = op.args["dim"]
    named = [named] if isinstance(named, int) else named
    rank, sizes = op.rank(0), shape_of(op.slots[0])
    gone = {d % rank for d in named if isinstance(sizes[d], int) and sizes[d] == 1}
    flow = _moved(operands, [d for d in range(rank) if d not in gone])
    # Made as a view: on a shard of one row the sequence must not be squeezed too.
    return replace(flow, is_view=True)


RULES = {
    aten.view: view,
    aten.reshape: view,
    aten._unsafe_view: view,  # noqa: SLF001
    aten._reshape_alias: view,  # noqa: SLF001
    aten.flatten: view,
    aten.view_as: view_as,
    aten.expand_as: expand_as,
    aten.movedim: movedim,
    aten.moveaxis: movedim,
    aten.unflatten: view,
    aten.expand: expand,
    aten.permute: permute,
    aten.transpose: transpose,
    aten.swapaxes: transpose,
    aten.swapdims: transpose,
    aten.t: swap_last,
    aten.mT: swap_last,
    aten.numpy_T: reverse,
    aten.unsqueeze: unsqueeze,
    aten.squeeze: squeeze,
}
