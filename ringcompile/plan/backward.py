"""The communications of a schedule, in the order in which every rank starts them.

KV of a stage is on its way while the stage before is computed; backward fetches KV
again and sends each step's dKV home when the step is done. There a part's own tile is
the last, under which the last dKV are on their way. Invariant: all ranks have the same
list of (phase, step); a rank's part in one may be empty.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count

from ringcompile.ir.schedule import Rows, Schedule, Step


class Phase(Enum):
    """What travels, and when."""

    FORWARD_KV = "forward KV"
    BACKWARD_KV = "backward KV"
    BACKWARD_DKV = "backward dKV"


@dataclass(frozen=True, slots=True)
class Communication:
    """One rank's part in one step's hops.

    Attributes:
        phase: what travels.
        part: number of the schedule's part.
        step: number of the step, counted over all parts.
        dst: to whom this rank sends; -1 for nobody.
        src: from whom it receives; -1 for nobody.
        sent: runs of rows that leave, if any: for KV of the sender's shard, for dKV of
            the receiver's. Of a part with a selection only selected ones travel.
        received: runs of rows that arrive.
    """

    phase: Phase
    part: int
    step: int
    dst: int
    src: int
    sent: tuple[Rows, ...]
    received: tuple[Rows, ...]


def communications(schedule: Schedule, rank: int) -> tuple[Communication, ...]:
    """What ``rank`` sends and receives for one attention, forward, then backward."""
    order = (*_order_forward(schedule), *_order_backward(schedule))
    return tuple(_take_part(turn, schedule.cp_size, rank) for turn in order)


def fetches_first(schedule: Schedule) -> bool:
    """Whether backward has to fetch before it can compute anything."""
    return bool(_order_stages(schedule)[0])


@dataclass(frozen=True, slots=True)
class _Turn:
    """One step's hops on all ranks."""

    phase: Phase
    part: int
    number: int
    step: Step


def _order_forward(schedule: Schedule) -> Iterator[_Turn]:
    for stages in _number_steps(schedule, Phase.FORWARD_KV):
        for stage in stages:
            yield from stage


def _order_backward(schedule: Schedule) -> Iterator[_Turn]:
    ordered = _order_stages(schedule)
    yield from ordered[0]
    for stage, following in zip(ordered, (*ordered[1:], ()), strict=True):
        yield from following
        for turn in stage:
            yield replace(turn, phase=Phase.BACKWARD_DKV)


def _order_stages(schedule: Schedule) -> list[tuple[_Turn, ...]]:
    """The hops of each stage of backward; own tiles have none."""
    ordered: list[tuple[_Turn, ...]] = []
    for first, *others in _number_steps(schedule, Phase.BACKWARD_KV):
        ordered += [first, *others] if first else [*others, first]
    return ordered


def _number_steps(
    schedule: Schedule, phase: Phase
) -> Iterator[tuple[tuple[_Turn, ...], ...]]:
    """The stages of each part; the own tile needs no hop."""
    number = count()
    for n, part in enumerate(schedule.parts):
        turns = [
            [_Turn(phase, n, next(number), step) for step in stage]
            for stage in part.stages
        ]
        yield tuple(tuple(t for t in stage if t.step.shift) for stage in turns)


def _take_part(turn: _Turn, cp_size: int, rank: int) -> Communication:
    owner = (rank - turn.step.shift) % cp_size
    reader = (rank + turn.step.shift) % cp_size
    mine, theirs = turn.step.tiles[rank].needs, turn.step.tiles[reader].needs
    ends = (reader, owner, theirs, mine)
    if turn.phase is Phase.BACKWARD_DKV:
        ends = (owner, reader, mine, theirs)
    dst, src, sent, received = ends
    return Communication(
        turn.phase,
        turn.part,
        turn.number,
        dst=dst if sent else -1,
        src=src if received else -1,
        sent=sent,
        received=received,
    )
