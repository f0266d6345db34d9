"""What the cost model decides: layouts, and how many ranks deal out heads."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import sympy

from ringcompile.ir.layout import Layout, Side
from ringcompile.ir.mask import K, Q
from ringcompile.ir.schedule import PartSpec, Schedule
from ringcompile.plan.cost import CPU, Machine, Sizes, estimate_seconds
from ringcompile.plan.stages import build_schedule

_SURE = 0.2
"""By how much striped shards, or dealing out heads, must be cheaper: more than the
model errs."""

_CANDIDATES = ("contiguous", "zigzag")  # the simplest first
_CLOSE = 0.03  # the model is no better than this; a closer call goes to the simpler


@dataclass(frozen=True, slots=True)
class Crossing:
    """A cross attention of a sequence whose layout is to be chosen.

    Attributes:
        parts: its mask.
        queries: where its queries lie; None: on that sequence.
        keys: where its keys lie; None: on that sequence.
    """

    parts: tuple[PartSpec, ...]
    queries: Side | None
    keys: Side | None

    def sides(self, chosen: Side) -> tuple[Side, Side]:
        """Where queries and keys lie once the sequence lies so."""
        return self.queries or chosen, self.keys or chosen


def choose_layout(
    attentions: Sequence[Sequence[PartSpec]],
    cp_size: int,
    length: int,
    *,
    crossings: Sequence[Crossing] = (),
    sizes: Sizes | None = None,
    machine: Machine = CPU,
) -> tuple[Layout, str]:
    """Choose one layout for all attentions of a sequence.

    Args:
        attentions: the parts of each attention: its pattern's, masks and selections.
        cp_size: number of ranks.
        length: tokens S, or a typical S.
        crossings: attentions between the sequence and others.
        sizes: sizes of the attentions; None for 32 heads of 128, 8 for KV.
        machine: the rates to reckon with.

    Returns:
        The layout, contiguous where zigzag gains nothing, and the reason in words.
        Striped where dilated windows then need no other rank's rows.
    """
    if cp_size == 1:
        return Layout("contiguous", 1), "one rank"
    sizes = sizes or Sizes()
    own = [Crossing(tuple(parts), None, None) for parts in attentions]
    counts = Counter([*own, *crossings])  # layers are mostly alike

    def estimate(name: str) -> float:
        chosen = Side(Layout(name, cp_size), length)
        return sum(
            number * _estimate(crossing.parts, *crossing.sides(chosen), sizes, machine)
            for crossing, number in counts.items()
        )

    seconds = {name: estimate(name) for name in _CANDIDATES}
    least = min(seconds.values())
    name = next(n for n in _CANDIDATES if seconds[n] <= least * (1 + _CLOSE))
    if not crossings and _lie_apart(attentions, cp_size):
        striped = estimate("striped")
        if striped * (1 + _SURE) <= least:
            name, seconds["striped"] = "striped", striped
    return Layout(name, cp_size), _format_reason(name, seconds)


def _lie_apart(attentions: Sequence[Sequence[PartSpec]], cp_size: int) -> bool:
    """Whether stripes tell residues apart, and masks are dilated windows of such rates.

    The model is right of those. It counts no blocks, and those that hold some of a
    stripe's pairs are many under other masks.
    """

    def is_apart(part: PartSpec) -> bool:
        mask, selection = part
        moved = mask.keeps.xreplace({Q: Q + 1, K: K + 1})
        is_told = mask.keeps.free_symbols <= {Q, K} and bool(moved == mask.keeps)
        rates = {int(m.args[1]) for m in mask.keeps.atoms(sympy.Mod)}
        are_whole = bool(rates) and all(
            cp_size % rate == 0 or rate % cp_size == 0 for rate in rates
        )
        return is_told and are_whole and selection is None and mask.choice is None

    return all(map(is_apart, chain.from_iterable(attentions)))


def _estimate(
    parts: Sequence[PartSpec], q: Side, kv: Side, sizes: Sizes, machine: Machine
) -> float:
    assert q.length is not None, "a typical length"
    return estimate_seconds(
        build_schedule(parts, q.layout, q.length, keys=kv),
        q.length,
        sizes=sizes,
        machine=machine,
        kv_length=kv.length,
    )


def _format_reason(name: str, seconds: dict[str, float]) -> str:
    relative = ", ".join(
        f"{other} {cost / seconds[name]:.2f}x"
        for other, cost in seconds.items()
        if other != name
    )
    return f"{name} costs least by the model ({relative})"


@lru_cache(maxsize=256)
def choose_ulysses(
    schedules: tuple[Schedule, ...], length: int, sizes: Sizes, machine: Machine
) -> tuple[Schedule, str]:
    """Choose how many ranks deal out the heads of an attention.

    Args:
        schedules: of a ring over all ranks, then of groups that deal out heads.
        length: tokens S.
        sizes: of the attention.
        machine: the rates to reckon with.

    Returns:
        The cheapest, the ring unless another is so by more than the model errs, and
        the reason in words.
    """
    seconds = [
        estimate_seconds(schedule, length, sizes=sizes, machine=machine)
        for schedule in schedules
    ]
    least = min(seconds)
    if seconds[0] <= least * (1 + _SURE):
        return schedules[0], ""
    best = schedules[seconds.index(least)]
    times = seconds[0] / least
    return best, (
        f"heads over {best.ulysses.size} ranks cost least by the model (a ring over all"
        f" {times:.2f}x)"
    )
