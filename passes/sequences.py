"""Whether an attention's keys are tokens of another sequence than its queries.

Lengths that differ say so. Of equal ones the graph tells, as far as it shows where
queries and keys come from: a query's rows are followed upwards through each attention's
own queries, never through its keys. Invariant: what is called cross is known to be; two
inputs of a graph that holds no more than their attention count as one sequence.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from torch.fx import Node

from ringcompile.passes.op import is_float, is_tensor, shape_of
from ringcompile.passes.regions import Refusal, Region
from ringcompile.torch_private import sizes_equal


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where keys come from, as against the queries of the same attention.

    Attributes:
        shares_rows: from values that the queries come from too.
        is_attended: from an attention that the queries do not come from.
        is_foreign: from an input that the queries do not come from.
    """

    shares_rows: bool
    is_attended: bool
    is_foreign: bool

    @property
    def is_own(self) -> bool:
        """Whether keys are known to be the queries' own."""
        return self.shares_rows and not (self.is_attended or self.is_foreign)


def mark_cross(found: Sequence[Region | Refusal]) -> tuple[Region | Refusal, ...]:
    """Say of each region whether its keys are another sequence."""
    regions = [f for f in found if isinstance(f, Region)]
    queries = {region.output: region.q.node for region in regions}
    origins = {r.output: _find_origin(r, queries) for r in regions if _is_square(r)}
    some_own = any(origin.is_own for origin in origins.values())

    def is_cross(region: Region) -> bool:
        origin = origins.get(region.output)
        if origin is None:
            return True
        return origin.is_attended or (origin.is_foreign and some_own)

    return tuple(
        replace(f, is_cross=is_cross(f)) if isinstance(f, Region) else f for f in found
    )


def _is_square(region: Region) -> bool:
    return sizes_equal(region.q.shape[2], region.k.shape[2])


def _find_origin(region: Region, queries: dict[Node, Node]) -> _Origin:
    of_queries = _climb(region.q.node, queries, frozenset())
    length = region.k.shape[2]
    shares = attended = foreign = False
    for node in _climb(region.k.node, {}, of_queries | queries.keys()):
        if node in of_queries:
            has_rows = is_float(node) and any(
                sizes_equal(size, length) for size in shape_of(node)
            )
            shares |= has_rows and not _is_parameter(node)
        elif node in queries:
            attended = True
        elif node.op == "placeholder" and is_tensor(node) and not _is_parameter(node):
            foreign |= len(shape_of(node)) > 1  # a sequence, with its batch
    return _Origin(shares, attended, foreign)


def _climb(
    start: Node, queries: dict[Node, Node], ends: AbstractSet[Node]
) -> frozenset[Node]:
    """All that a node is computed from, up to ``ends``; of attentions their queries."""
    work, seen = [start], {start}
    while work:
        node = work.pop()
        if node in ends:
            continue
        above = [queries[node]] if node in queries else node.all_input_nodes
        work += [n for n in above if n not in seen]
        seen.update(above)
    return frozenset(seen)


def _is_parameter(node: Node) -> bool:
    return bool(node.meta.get("is_parameter"))
