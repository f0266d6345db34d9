"""Checks: what every schedule must obey before any rank runs it.

Invariant: a schedule that passes computes each kept pair exactly once, and its hops
pair up and cannot wait for each other for ever, on a transport that keeps their order.
"""

from collections.abc import Sequence
from itertools import pairwise

import networkx as nx

from ringcompile.errors import PlanError
from ringcompile.ir.layout import Side
from ringcompile.ir.schedule import (
    Coverage,
    Kernel,
    Part,
    Rows,
    Schedule,
    Tile,
    format_runs,
)
from ringcompile.plan.backward import Communication, communications
from ringcompile.plan.check_pairs import check_pairs, checked_sides


def check_schedule(schedule: Schedule) -> None:
    """Raise unless ranks can run ``schedule`` and get what its masks mean.

    Raises:
        PlanError: a step, tile or hop breaks a rule; it says which.
    """
    for number, part in enumerate(schedule.parts):
        check_steps(part, schedule.cp_size, where=f"part {number}")
        for sides in checked_sides(schedule):
            for step in part.steps:
                for rank, tile in enumerate(step.tiles):
                    where = f"part {number}, shift {step.shift}, rank {rank}"
                    check_tile(tile, *sides, where=where)
        check_pairs(schedule, number)
    ranks = range(schedule.cp_size)
    check_communications([communications(schedule, rank) for rank in ranks])


def check_steps(part: Part, cp_size: int, *, where: str) -> None:
    """Raise unless every rank pair occurs at most once, the own KV first."""
    shifts = [step.shift for step in part.steps]
    if shifts[:1] != [0]:
        raise PlanError(f"steps of shifts {shifts}", at=where, because="0 comes first")
    if len(set(shifts)) < len(shifts) or not all(0 <= s < cp_size for s in shifts):
        because = f"{cp_size} ranks have the shifts 0 to {cp_size - 1}, each once"
        raise PlanError(f"steps of shifts {shifts}", at=where, because=because)
    for step in part.steps:
        if len(step.tiles) != cp_size:
            what = f"{len(step.tiles)} tiles in the step of shift {step.shift}"
            raise PlanError(what, at=where, because=f"there are {cp_size} ranks")


def check_tile(tile: Tile, q_side: Side, kv_side: Side, *, where: str) -> None:
    """Raise unless a tile's pieces lie in the rows it has, for known lengths."""
    q_chunk, chunk = q_side.chunk, kv_side.chunk
    assert q_chunk is not None, "queries of a known length"
    assert chunk is not None, "keys of a known length"
    is_empty = tile.coverage is Coverage.EMPTY
    if is_empty != (not tile.pieces) or is_empty != (not tile.needs):
        what = f"{len(tile.pieces)} pieces in a tile of coverage {tile.coverage.name}"
        raise PlanError(what, at=where, because="a tile is empty iff it has no pieces")
    q_shard, kv_shard = (
        Rows((0, 0), (side.layout.chunks_per_rank, 0)) for side in (q_side, kv_side)
    )
    for run in tile.needs:
        _check_within(run, (kv_shard,), chunk, where=where)
    for before, run in pairwise(tile.needs):
        if before.resolve(chunk)[1] >= run.resolve(chunk)[0]:
            what = f"needed rows {before} and {run} for chunks of {chunk}"
            raise PlanError(what, at=where, because="runs are in order and apart")
    for piece in tile.pieces:
        _check_within(piece.q, (q_shard,), q_chunk, where=where)
        _check_within(piece.kv, tile.needs, chunk, where=where)
        q, kv = piece.q.resolve(q_chunk), piece.kv.resolve(chunk)
        if piece.kernel is Kernel.CAUSAL and q[1] - q[0] != kv[1] - kv[0]:
            what = f"a causal piece of rows {piece.q} and {piece.kv}"
            raise PlanError(what, at=where, because="it is no square")


def _check_within(rows: Rows, runs: Sequence[Rows], chunk: int, *, where: str) -> None:
    start, stop = rows.resolve(chunk)
    ends = [run.resolve(chunk) for run in runs]
    if not any(first <= start < stop <= end for first, end in ends):
        within = " or ".join(map(str, runs))
        what = f"rows {rows} in {within} for chunks of {chunk}"
        raise PlanError(what, at=where, because="they do not lie within")


def check_communications(lists: Sequence[Sequence[Communication]]) -> None:
    """Raise unless the ranks' ordered communications fit together.

    Args:
        lists: one for each rank.

    Raises:
        PlanError: a hop has no partner or another row count there, ranks would wait for
            each other in a ring, or their lists differ in order.
    """
    at = [{_key(hop): n for n, hop in enumerate(hops)} for hops in lists]
    for rank, hops in enumerate(lists):
        for hop in hops:
            _check_partner(lists, at, rank, hop)
    _check_waits(lists, at)
    orders = [[_key(hop) for hop in hops] for hops in lists]
    for rank, order in enumerate(orders):
        if order != orders[0]:
            step = next(
                (
                    n
                    for n, (a, b) in enumerate(zip(order, orders[0], strict=False))
                    if a != b
                ),
                len(order),
            )
            raise PlanError(
                f"ranks 0 and {rank} differ at their communication {step}",
                because="all ranks start the same communications in the same order",
            )


_Key = tuple[str, int, int]


def _key(hop: Communication) -> _Key:
    return hop.phase.value, hop.part, hop.step


def _check_partner(
    lists: Sequence[Sequence[Communication]],
    at: Sequence[dict[_Key, int]],
    rank: int,
    hop: Communication,
) -> None:
    ends = ((hop.dst, hop.sent, "send"), (hop.src, hop.received, "receive"))
    for peer, rows, verb in ends:
        where = f"rank {rank}, {hop.phase.value}, step {hop.step}"
        if (peer < 0) != (not rows):
            raise PlanError(f"{verb}s {format_runs(rows)} with peer {peer}", at=where)
        if not rows:
            continue
        n = at[peer].get(_key(hop))
        other = None if n is None else lists[peer][n]
        theirs: tuple[Rows, ...] = ()
        if other is not None:
            back, theirs = (
                (other.src, other.received)
                if verb == "send"
                else (other.dst, other.sent)
            )
            theirs = theirs if back == rank else ()
        if theirs != rows:
            mine, other_rows = format_runs(rows), format_runs(theirs)
            raise PlanError(
                f"{verb}s rows {mine}, while rank {peer} has {other_rows} for it",
                at=where,
                because="both ends of a hop count the same rows",
            )


def _check_waits(
    lists: Sequence[Sequence[Communication]], at: Sequence[dict[_Key, int]]
) -> None:
    """Transports keep order: a hop ends after the one before, here and at its peers."""
    waits = nx.DiGraph()
    for rank, hops in enumerate(lists):
        waits.add_edges_from(pairwise((rank, n) for n in range(len(hops))))
        for n, hop in enumerate(hops):
            for peer in (hop.dst, hop.src):
                before = at[peer][_key(hop)] - 1 if peer >= 0 else -1
                if before >= 0:
                    waits.add_edge((peer, before), (rank, n))
    if nx.is_directed_acyclic_graph(waits):
        return
    ring = [edge[0] for edge in nx.find_cycle(waits)]
    texts = (
        f"rank {r}, {lists[r][n].phase.value}, step {lists[r][n].step}" for r, n in ring
    )
    raise PlanError(
        "communications that wait for each other",
        at=" -> ".join(texts),
        because="each ends only after the one before it",
    )
