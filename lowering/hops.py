"""Hops: the tags that name them, and their start and landing in the ring loop.

A tag says which attention, phase and step a transfer belongs to. Invariants: no two
hops of one ring share a tag; rings whose plans are alike share theirs and run in order;
and all ranks emit the same list of tags.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from ringcompile import ops
from ringcompile.ir.attention import RankPlan
from ringcompile.lowering.rows import Size
from ringcompile.torch_private import WAIT_TENSOR


class Phase(IntEnum):
    """What travels, and when."""

    FORWARD_KV = 0
    BACKWARD_KV = 1
    BACKWARD_DKV = 2
    RESHARD = 3
    EXCHANGE = 4

    @property
    def label(self) -> str:
        """The phase for people."""
        labels = ("forward KV", "backward KV", "backward dKV", "reshard", "exchange")
        return labels[self]


RESHARDS = ("shard", "gather", "reduce", "spread")


class Exchange(IntEnum):
    """What ranks that deal out heads give each other."""

    QKV = 0  # rows for heads
    OUT = 1  # heads for rows
    GRAD_OUT = 2  # rows for heads
    GRADS = 3  # heads for rows

    @property
    def is_to_heads(self) -> bool:
        """Whether a rank then has some heads of all rows."""
        return self in {Exchange.QKV, Exchange.GRAD_OUT}


# gloo's tags are 31 bits wide: 2**15 attentions, 8 phases, 2**13 steps.
_PHASES = 8
_STEPS = 2**13
_ATTENTIONS = 2**15

SHARED = _ATTENTIONS - 1
"""The number of several attentions that are compiled as one, which run in order: none
starts a hop before the one before it has waited for its own of that tag."""


@dataclass(frozen=True, slots=True)
class Tag:
    """Where in a program a transfer happens.

    Attributes:
        attention: number of the attention in its model; 0 for reshards.
        phase: what travels.
        step: number of the step, counted over all parts; or of the kind of reshard; or
            of a peer's place in an exchange.
    """

    attention: int
    phase: Phase
    step: int

    def encode(self) -> int:
        """The tag as the number that ops carry."""
        assert 0 <= self.step < _STEPS, f"step {self.step} has no tag"
        assert 0 <= self.attention <= SHARED, f"attention {self.attention}: no tag"
        return (self.attention * _PHASES + self.phase) * _STEPS + self.step

    @classmethod
    def decode(cls, number: int) -> "Tag":
        """Read a tag back."""
        head, step = divmod(number, _STEPS)
        attention, phase = divmod(head, _PHASES)
        return cls(attention, Phase(phase), step)

    def __str__(self) -> str:
        if self.phase is Phase.RESHARD:
            return f"reshard ({RESHARDS[self.step]})"
        which = f"attention {self.attention}"
        if self.attention == SHARED:
            which = "one of several attentions"
        return f"{which}, {self.phase.label}, step {self.step}"


def reshard_tag(kind: str) -> int:
    """The tag of a collective of that kind of reshard."""
    return Tag(0, Phase.RESHARD, RESHARDS.index(kind)).encode()


@dataclass(frozen=True, slots=True)
class Flight:
    """A hop under way; its tensors must not be read before ``Hops.land``.

    Attributes:
        results: one tensor for each that was sent.
        is_here: whether there is nothing to wait for.
    """

    results: tuple[Tensor, ...]
    is_here: bool = False


class Hops:
    """The hops of one direction of one attention, each ordered behind the one before.

    A rank that only sends at a step waits for no rows, which nothing reads. The wait
    stays all the same, and with it the send: torch takes it for a side effect, and the
    partitioner, which does not ask, never sees a hop.
    """

    def __init__(self, plan: RankPlan) -> None:
        self._place = (plan.group_name, plan.timeout_s, plan.transport)
        self._after: list[Tensor] = []

    def start(
        self, tag: Tag, payload: Sequence[Tensor], *, dst: int, src: int, rows: Size
    ) -> Flight:
        """Send ``payload`` to ``dst`` and expect ``rows`` rows for each from ``src``.

        A rank of -1 means nobody: what is sent to it, or comes from it, has no rows.
        """
        results = ops.HOP(
            *(list(payload), self._after, dst, src, [rows] * len(payload)),
            *(tag.encode(), *self._place),
        )
        self._after = list(results[:1])
        return Flight(tuple(results))

    def land(self, flight: Flight) -> tuple[Tensor, ...]:
        """Wait until what was sent has left and what comes is here."""
        if flight.is_here:
            return flight.results
        return tuple(WAIT_TENSOR(x) for x in flight.results)


def keep(x: Tensor, deps: Sequence[Tensor] = ()) -> Tensor:
    """``x``, saved for backward even where its surroundings are recomputed."""
    kept: Tensor = ops.KEEP(x, list(deps))
    return kept


def _copy(x: Tensor, _deps: Sequence[Tensor]) -> Tensor:
    return x.clone()


ops.LIBRARY.impl("keep", _copy, "CompositeExplicitAutograd")
