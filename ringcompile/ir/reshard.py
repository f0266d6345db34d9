"""Where a value's rows lie: what the reshard ops carry as text.

Invariant: ``parse_spec(format_spec(spec)) == spec``.
"""

from dataclasses import dataclass

from ringcompile.ir.layout import Layout


@dataclass(frozen=True, slots=True)
class ReshardSpec:
    """One rank's place in the layout that a reshard leads to or from.

    Attributes:
        layout: which positions each rank holds.
        rank: this rank's place in the CP group.
        group_name: the process group's name; empty for one rank.
        timeout_s: a collective older than this raises.
        sources: hash of the lowering's source files (a cached graph must not survive
            their change).
    """

    layout: Layout
    rank: int
    group_name: str
    timeout_s: float
    sources: str


def format_spec(spec: ReshardSpec) -> str:
    """Write a spec as canonical text."""
    return (
        f"layout={spec.layout.key} cp_size={spec.layout.cp_size} rank={spec.rank}"
        f" timeout_s={spec.timeout_s!r} sources={spec.sources} group={spec.group_name}"
    )


def parse_spec(text: str) -> ReshardSpec:
    """Read a spec back."""
    fields = dict(field.split("=", 1) for field in text.split(" ", 5))
    return ReshardSpec(
        layout=Layout.parse(fields["layout"], int(fields["cp_size"])),
        rank=int(fields["rank"]),
        group_name=fields["group"],
        timeout_s=float(fields["timeout_s"]),
        sources=fields["sources"],
    )
