"""Traffic: how many rows, and so how many bytes, each rank sends.

Formulas are sympy expressions in the sizes of a call, so one report serves all of them.
Invariant: what a rank is said to send, its peers are said to receive.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import sympy

from ringcompile.ir.layout import Layout
from ringcompile.ir.schedule import Schedule, Selection
from ringcompile.plan.backward import Communication, Phase, communications
from ringcompile.plan.selection import selected_rows

BATCH, KV_HEADS, LENGTH = sympy.symbols("B G S", positive=True, integer=True)
"""Batches, KV heads and keys: KV travels; queries only where ranks deal out heads."""
HEADS = sympy.Symbol("H", positive=True, integer=True)
HEAD_SIZE, VALUE_SIZE = sympy.symbols("D E", positive=True, integer=True)
ITEM_BYTES = sympy.Symbol("item_bytes", positive=True, integer=True)
GRAD_BYTES = 4  # dKV travels as float32, or at most so (Part.is_one_call)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank sends for one attention.

    Attributes:
        forward: KV, in ``B, G, S, D, E`` and ``item_bytes``; where ranks deal out heads
            also q and out, and ``H``.
        backward: KV again, dKV as sums in float32, and what was dealt out.
    """

    forward: sympy.Expr
    backward: sympy.Expr

    def resolve(self, sizes: dict[sympy.Symbol, int]) -> tuple[int, int]:
        """Both as numbers."""
        forward, backward = self.forward.subs(sizes), self.backward.subs(sizes)
        return int(forward), int(backward)


def bytes_per_rank(schedule: Schedule) -> tuple[Traffic, ...]:
    """What each rank sends, in rank order."""
    return tuple(
        traffic
        for rank in range(schedule.cp_size)
        for traffic in [_bytes_of(schedule, rank)] * schedule.ulysses.size
    )


def _bytes_of(schedule: Schedule, rank: int) -> Traffic:
    totals = dict.fromkeys(Phase, sympy.Integer(0))
    side = schedule.kv_side
    chunk = LENGTH / side.layout.num_chunks
    if side.chunk is not None:
        chunk = sympy.Integer(side.chunk)
    for hop in communications(schedule, rank):
        chunks, rows = count_sent_rows(schedule, hop, rank)
        totals[hop.phase] += chunks * chunk + sympy.Rational(rows)
    size = schedule.ulysses.size
    per_row = BATCH * KV_HEADS * (HEAD_SIZE + VALUE_SIZE) / size
    shard = chunk * side.layout.chunks_per_rank / size
    heads = BATCH * (HEADS + KV_HEADS) * (HEAD_SIZE + VALUE_SIZE)
    exchanged = ITEM_BYTES * heads * shard * sympy.Rational(size - 1, size)
    backward = totals[Phase.BACKWARD_KV] * ITEM_BYTES
    backward += totals[Phase.BACKWARD_DKV] * GRAD_BYTES
    return Traffic(
        sympy.expand(totals[Phase.FORWARD_KV] * ITEM_BYTES * per_row + exchanged),
        sympy.expand(backward * per_row + exchanged),
    )


def count_sent_rows(
    schedule: Schedule, hop: Communication, rank: int
) -> tuple[int, Fraction]:
    """Rows per KV head that ``rank`` sends in one hop, affine in the chunk length.

    KV heads that select different numbers of rows send their own, here on average.
    """
    if not hop.sent:
        return 0, Fraction(0)
    selection = schedule.parts[hop.part].selection
    if selection is not None:
        is_home = hop.phase is Phase.BACKWARD_DKV
        owner, reader = (hop.dst, rank) if is_home else (rank, hop.dst)
        assert schedule.length is not None, "selected rows are those of one length"
        ends = (owner, reader, schedule.length)
        return 0, _count_selected(selection, schedule.layout, *ends)
    edges = [(rows.start, rows.stop) for rows in hop.sent]
    chunks, rows = (sum(stop[i] - start[i] for start, stop in edges) for i in (0, 1))
    return chunks, Fraction(rows)


@lru_cache(maxsize=4096)
def _count_selected(
    selection: Selection, layout: Layout, owner: int, reader: int, length: int
) -> Fraction:
    rows = selected_rows(
        selection,
        layout.positions(owner, length),
        length=length,
        for_positions=layout.positions(reader, length),
    )
    return Fraction(sum(map(len, rows)), len(rows))
