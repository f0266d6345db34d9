"""Schedules: tiles of all rank pairs, ordered in steps, grouped in stages.

Invariant: the first step is each rank's own KV (shift 0); a later step in which no rank
has work is dropped; no shift occurs twice.
"""

from collections.abc import Sequence
from functools import lru_cache

from ringcompile.ir.layout import Layout, Side
from ringcompile.ir.mask import Mask
from ringcompile.ir.schedule import (
    MixedParts,
    Mixing,
    Part,
    PartSpec,
    Schedule,
    Selection,
    Step,
)
from ringcompile.plan.selection import build_selected_tile
from ringcompile.plan.tiles import build_tile


def build_schedule(
    parts: Sequence[PartSpec],
    layout: Layout,
    length: int | None,
    *,
    num_stages: int | None = None,
    keys: Side | None = None,
) -> Schedule:
    """Plan one attention for all ranks.

    Args:
        parts: masks and row selections whose results are merged; one for plain
            attention. `MixedParts` say how else.
        layout: which positions each rank holds.
        length: tokens S; None for a schedule that serves every S that needs no padding.
        num_stages: each part's steps are grouped into at most this many stages, the own
            tile alone in the first; None: a stage for each step; 1: all together.
        keys: where keys and values lie, if on another sequence than the queries.

    Raises:
        DependsOnLength: a length is None and no one schedule serves every S.
    """
    if keys == Side(layout, length) and length is not None:
        keys = None
    assert keys is None or keys.layout.cp_size == layout.cp_size, "the same ranks"
    assert num_stages is None or num_stages >= 1, "a schedule has a stage"
    built = tuple(
        Part(mask, selection, _group(steps, num_stages))
        for mask, selection in parts
        for steps in [_build_steps(mask, selection, layout, length, keys)]
    )
    mixing = parts.mixing if isinstance(parts, MixedParts) else Mixing()
    return Schedule(layout, length, built, mixing, keys)


@lru_cache(maxsize=256)
def _build_steps(
    mask: Mask,
    selection: Selection | None,
    layout: Layout,
    length: int | None,
    keys: Side | None,
) -> tuple[Step, ...]:
    assert selection is None or keys is None, "rows are selected of one sequence"
    ranks = range(layout.cp_size)
    steps = []
    for shift in ranks:
        pairs = [(r, (r - shift) % layout.cp_size) for r in ranks]
        if selection is None:
            tiles = [build_tile(mask, layout, q, kv, length, keys) for q, kv in pairs]
        else:
            tiles = [
                build_selected_tile(mask, selection, layout, pair, length)
                for pair in pairs
            ]
        step = Step(shift, tuple(tiles))
        if shift == 0 or not step.is_idle:
            steps.append(step)
    return tuple(steps)


def _group(
    steps: tuple[Step, ...], num_stages: int | None
) -> tuple[tuple[Step, ...], ...]:
    """The own step alone, the rest in equal groups, the larger first."""
    if num_stages == 1:
        return (steps,)
    own, rest = steps[:1], steps[1:]
    num_groups = len(rest) if num_stages is None else min(num_stages - 1, len(rest))
    stages = [own]
    for n in range(num_groups):
        size = -(-len(rest) // (num_groups - n))
        stages.append(rest[:size])
        rest = rest[size:]
    return tuple(stages)
