"""Ulysses: ranks trade rows of all heads for all rows of some before a ring, then back.

What goes from rank to rank goes by hops, as K and V do. Autograd and AOTAutograd see
one op for each trade; before Inductor lowers a graph ``expand`` writes it out.
Invariant: a trade and its transpose undo each other, so gradients take the other one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringcompile import ops
from ringcompile.ir.schedule import Ulysses
from ringcompile.lowering.hops import Exchange, Hops, Phase, Tag
from ringcompile.lowering.program import read_plan
from ringcompile.lowering.rows import join


def trade_rows(
    q: Tensor, k: Tensor, v: Tensor, *, plan: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Give away rows of heads, and get all rows of some.

    Args:
        q: this rank's rows ``(B, H, T, D)``.
        k: ``(B, G, T, D)``.
        v: ``(B, G, T, E)``.
        plan: the attention's.

    Returns:
        ``(B, H / size, size * T, D)`` and so on, in the order of the plan's layout; as
        they are if the plan trades nothing.
    """
    if read_plan(plan).schedule.ulysses.size == 1:
        return q, k, v
    q, k, v = _Trade.apply(plan, Exchange.QKV, q, k, v)  # type: ignore[no-untyped-call]
    return q, k, v


def trade_heads(out: Tensor, *, plan: str) -> Tensor:
    """Give rows of some heads back, and get this rank's rows of all."""
    if read_plan(plan).schedule.ulysses.size == 1:
        return out
    (out,) = _Trade.apply(plan, Exchange.OUT, out)  # type: ignore[no-untyped-call]
    return out


_TRANSPOSES = {Exchange.QKV: Exchange.GRADS, Exchange.OUT: Exchange.GRAD_OUT}


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        plan: str,
        kind: Exchange,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.kind = plan, _TRANSPOSES[kind]
        traded = tuple(ops.EXCHANGE(xs, kind=kind, plan=plan))
        needed = zip(traded, ctx.needs_input_grad[2:], strict=True)
        ctx.mark_non_differentiable(*(x for x, need in needed if not need))
        return traded

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's
        *grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        asked = [x for x, need in zip(grads, needed, strict=True) if need]
        found = iter(ops.EXCHANGE(asked, kind=ctx.kind, plan=ctx.plan))
        return None, None, *(next(found) if need else None for need in needed)


def exchange(xs: Sequence[Tensor], *, kind: int, plan: str) -> list[Tensor]:
    """What ``ops.EXCHANGE`` does; every rank starts the same hops."""
    record, what = read_plan(plan), Exchange(kind)
    ulysses, hops = record.schedule.ulysses, Hops(record)
    size, mine = ulysses.size, record.member
    take = _take_heads if what.is_to_heads else _take_rows
    own = tuple(take(x, mine, ulysses) for x in xs)
    flights = {}
    for shift in range(1, size):
        dst, src = (mine + shift) % size, (mine - shift) % size
        flights[src] = hops.start(
            Tag(record.index, Phase.EXCHANGE, what * size + shift),
            [take(x, dst, ulysses) for x in xs],
            dst=record.find_peer(member=dst),
            src=record.find_peer(member=src),
            rows=own[0].shape[2],
        )
    arrived = {src: hops.land(flight) for src, flight in flights.items()}
    arrived[mine] = own
    parts = zip(*(arrived[member] for member in range(size)), strict=True)
    put = _join_rows if what.is_to_heads else _join_heads
    return [put(of_members, ulysses) for of_members in parts]


def _take_heads(x: Tensor, member: int, ulysses: Ulysses) -> Tensor:
    """A member's heads of this rank's rows."""
    count = x.shape[1] // ulysses.size
    return x.narrow(1, member * count, count)


def _join_heads(xs: Sequence[Tensor], _ulysses: Ulysses) -> Tensor:
    """This rank's rows of the heads of each member."""
    return _join(xs, 1)


def _take_rows(x: Tensor, member: int, ulysses: Ulysses) -> Tensor:
    """A member's rows of this rank's heads."""
    chunks = _cut(x, ulysses.size * ulysses.chunks)
    return _join([chunks[n] for n in _chunks_of(member, ulysses)], 2)


def _join_rows(xs: Sequence[Tensor], ulysses: Ulysses) -> Tensor:
    """All rows of this rank's heads, of those of each member."""
    chunks = {
        n: chunk
        for member, x in enumerate(xs)
        for n, chunk in zip(
            _chunks_of(member, ulysses), _cut(x, ulysses.chunks), strict=True
        )
    }
    return _join([chunks[n] for n in sorted(chunks)], 2)


def _chunks_of(member: int, ulysses: Ulysses) -> list[int]:
    """Where a member's chunks lie among all: of each round, back and forth by turns."""
    size = ulysses.size
    turn = (member, size - 1 - member)
    return [n * size + turn[n % 2] for n in range(ulysses.chunks)]


def _cut(x: Tensor, count: int) -> list[Tensor]:
    """Rows in so many equal runs."""
    size = x.shape[2] // count
    return [x.narrow(2, n * size, size) for n in range(count)]


def _join(xs: Sequence[Tensor], dim: int) -> Tensor:
    return xs[0] if len(xs) == 1 else join(xs, dim)


def _exchange_shapes(xs: Sequence[Tensor], *, kind: int, plan: str) -> list[Tensor]:
    size = read_plan(plan).schedule.ulysses.size
    if Exchange(kind).is_to_heads:
        shapes = [(x.shape[0], x.shape[1] // size, size * x.shape[2]) for x in xs]
    else:
        shapes = [(x.shape[0], size * x.shape[1], x.shape[2] // size) for x in xs]
    return [x.new_empty((*s, x.shape[3])) for x, s in zip(xs, shapes, strict=True)]


ops.LIBRARY.impl("exchange", exchange, "CompositeExplicitAutograd")
torch.library.register_fake("ringcompile::exchange", _exchange_shapes, lib=ops.LIBRARY)
