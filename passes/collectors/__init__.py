"""Ops on shards that need other ranks, or a shard's place, to give eager's result.

Each is computed on the shard, pads left out, and then reduced: ``Partial`` never
outlives its op.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ringcompile.passes.collectors import (
    draws,
    extremes,
    losses,
    moments,
    norms,
    products,
    rows,
    sums,
)
from ringcompile.passes.collectors.base import Collector
from ringcompile.passes.op import Op

if TYPE_CHECKING:
    from ringcompile.passes.propagate_layout import Placement

_COLLECTORS: dict[Any, tuple[Collector, ...]] = {
    **sums.COLLECTORS,
    **extremes.COLLECTORS,
    **moments.COLLECTORS,
    **products.COLLECTORS,
    **losses.COLLECTORS,
    **draws.COLLECTORS,
    **norms.COLLECTORS,
    **rows.COLLECTORS,
}


def find_collector(op: Op, current: Sequence["Placement"]) -> Collector | None:
    """The collector that can carry out ``op`` on these placements, if any."""
    found = _COLLECTORS.get(op.packet, ())
    return next((c for c in found if c.accepts(op, current)), None)


__all__ = ["Collector", "find_collector"]
