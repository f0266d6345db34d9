"""The report of ``explain``: what it knows, as one object."""

import json
from dataclasses import asdict, dataclass

from ringcompile.report.records import (
    AttentionReport,
    GatherReport,
    GraphReport,
    Memory,
    ScheduleReport,
    Traffic,
)
from ringcompile.report.text import format_report


@dataclass(frozen=True, slots=True)
class Report:
    """What ``torch.compile(model, backend="ring")`` would do on ``world_size`` ranks.

    Attributes:
        world_size: the number of ranks, P.
        graphs: one for each graph that Dynamo made of the model.
    """

    world_size: int
    graphs: tuple[GraphReport, ...]

    @property
    def attentions(self) -> tuple[AttentionReport, ...]:
        """Every attention of the model."""
        return tuple(a for g in self.graphs for a in g.attentions)

    @property
    def gathers(self) -> tuple[GatherReport, ...]:
        """Every value that is made whole on every rank, outputs included."""
        return tuple(x for g in self.graphs for x in g.gathers)

    @property
    def schedules(self) -> tuple[ScheduleReport, ...]:
        """Every schedule, with the attentions that run it."""
        return tuple(s for g in self.graphs for s in g.schedules)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may want to change."""
        return tuple(n for g in self.graphs for n in g.notes)

    @property
    def traffic(self) -> Traffic:
        """Bytes each rank sends in one forward and backward, by kind."""
        return Traffic.sum_of((g.traffic for g in self.graphs), self.world_size)

    @property
    def bytes_per_rank(self) -> tuple[int, ...]:
        """Bytes each rank sends in one forward and backward, by rank."""
        return self.traffic.total

    @property
    def memory_per_rank(self) -> Memory:
        """Bytes a rank holds at the end of forward; an estimate."""
        return sum((g.memory for g in self.graphs), Memory(0, 0, 0, 0))

    def graph(self, pass_name: str = "rewrite", rank: int = 0) -> str:
        """Write the graph of ``rank`` after a pass; all graphs, if there are several.

        Args:
            pass_name: ``shadow``, ``raise_attention`` or ``rewrite``.
            rank: whose graph; passes before ``rewrite`` are alike for all ranks.

        Raises:
            ValueError: there is no such pass or rank.
        """
        if not 0 <= rank < self.world_size:
            message = f"rank={rank}: the ranks are 0 to {self.world_size - 1}"
            raise ValueError(message)
        texts = [g.format_passes(rank) for g in self.graphs]
        names = list(dict.fromkeys(name for text in texts for name in text))
        if pass_name not in names:
            known = ", ".join(map(repr, names)) or "none, since nothing was compiled"
            message = f"pass_name={pass_name!r}: the passes are {known}"
            raise ValueError(message)
        found = [text[pass_name] for text in texts if pass_name in text]
        if len(found) == 1:
            return found[0]
        heads = (f"# graph {n} of {len(found)}\n" for n in range(len(found)))
        return "\n".join(head + text for head, text in zip(heads, found, strict=True))

    def to_json(self) -> str:
        """Write all but the graphs' texts as JSON."""
        traffic, memory = self.traffic, self.memory_per_rank
        picture = {
            "world_size": self.world_size,
            "num_graphs": len(self.graphs),
            "attentions": [asdict(a) for a in self.attentions],
            "gathers": [asdict(g) for g in self.gathers],
            "schedules": [asdict(s) for s in self.schedules],
            "bytes_per_rank": asdict(traffic) | {"total": traffic.total},
            "memory_per_rank": asdict(memory) | {"total": memory.total},
            "notes": list(self.notes),
        }
        return json.dumps(picture, indent=2)

    def __str__(self) -> str:
        return format_report(self.graphs, self.world_size)
