"""What ``explain`` tells: plain data about every graph of one model.

Invariant: everything here, but what writes a graph's text, is a number, a text or a
tuple of such, so that it prints, compares and turns into JSON.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Literal

Status = Literal["ring", "gathered", "dense"]


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """One attention of the model.

    Attributes:
        name: its module, e.g. ``model.layers.0.self_attn``; the op's name outside of
            modules.
        where: the user's ``file:line``, or the library model's if there is none.
        call_line: the ``file:line`` that calls the op itself.
        status: ``ring``; ``gathered`` if it runs whole on every rank; ``dense`` if
            there is one rank and so nothing to cut.
        mask: the pairs that count, as read; empty if it was refused.
        dropout: share of weights that are dropped; empty if none is.
        pattern: what was chosen on top of the mask; empty if it was refused.
        layout: which positions each rank holds; empty if nothing is cut.
        reason: why this layout, or why no ring, and what to do about it.
    """

    name: str
    where: str
    call_line: str
    status: Status
    mask: str = ""
    dropout: str = ""
    pattern: str = ""
    layout: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GatherReport:
    """A value that is made whole on every rank.

    Attributes:
        where: the user's ``file:line``.
        what: the op that needs it whole, or the output that it is.
        num_bytes: of the whole value.
        because: why it can't stay sharded.
    """

    where: str
    what: str
    num_bytes: int
    because: str


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step of a schedule moves.

    Attributes:
        part: number of the schedule's part.
        step: number of the step in it, as the schedule's text counts.
        forward_bytes: sent by each rank, by rank, in forward.
        backward_bytes: the same in backward: K, V and their gradients.
    """

    part: int
    step: int
    forward_bytes: tuple[int, ...]
    backward_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScheduleReport:
    """One schedule and the attentions that run it.

    Attributes:
        attentions: their names.
        text: the schedule drawn: a row for each step, a column for each rank.
        steps: what each step moves for one of these attentions.
    """

    attentions: tuple[str, ...]
    text: str
    steps: tuple[StepReport, ...]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that each rank sends in one forward and one backward, by rank.

    Attributes:
        hops_forward: K and V of attentions.
        hops_backward: K, V and their gradients.
        gathers: all-gathers of values that are made whole, forward and backward.
        reduces: all-reduces of parameter gradients, losses and the like. A rank is
            counted as sending ``2 (P - 1) / P`` of each value.
    """

    hops_forward: tuple[int, ...]
    hops_backward: tuple[int, ...]
    gathers: tuple[int, ...]
    reduces: tuple[int, ...]

    @property
    def total(self) -> tuple[int, ...]:
        """All of them, by rank."""
        parts = (getattr(self, f.name) for f in fields(self))
        return tuple(map(sum, zip(*parts, strict=True)))

    def __add__(self, other: "Traffic") -> "Traffic":
        def add(name: str) -> tuple[int, ...]:
            pairs = zip(getattr(self, name), getattr(other, name), strict=True)
            return tuple(map(sum, pairs))

        return Traffic(*(add(f.name) for f in fields(self)))

    @classmethod
    def sum_of(cls, parts: "Iterable[Traffic]", world_size: int) -> "Traffic":
        """The sum of any number of them."""
        nothing = (0,) * world_size
        return sum(parts, cls(nothing, nothing, nothing, nothing))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each rank, equal for all since shards are padded to one size.

    Attributes:
        parameters: all of them; they are not sharded.
        saved: what autograd saves for backward beside those, before Inductor recomputes
            or fuses anything: an upper bound of the compiled graph's.
        attention: the part of it that attentions save: q, k, v, out, LSE.
        gathered: values made whole, outputs included.
    """

    parameters: int
    saved: int
    attention: int
    gathered: int

    @property
    def total(self) -> int:
        """Parameters, what is saved and what is gathered; no temporaries."""
        return self.parameters + self.saved + self.gathered

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        )


@dataclass(frozen=True, slots=True)
class GraphReport:
    """One graph of the model; there are several if Dynamo broke it.

    Attributes:
        attentions: in the order of the graph.
        gathers: what is made whole, outputs included.
        schedules: each once.
        traffic: what ranks send.
        memory: what a rank holds.
        notes: what the user may want to change.
        format_passes: writes the graph of a rank after each pass, by the pass's name.
    """

    attentions: tuple[AttentionReport, ...]
    gathers: tuple[GatherReport, ...]
    schedules: tuple[ScheduleReport, ...]
    traffic: Traffic
    memory: Memory
    notes: tuple[str, ...]
    format_passes: Callable[[int], dict[str, str]] = field(compare=False, repr=False)
