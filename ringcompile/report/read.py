"""What the passes made of a graph, read into records."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from torch.fx import GraphModule, Node

from ringcompile.config import RingOptions
from ringcompile.ir.schedule import Schedule
from ringcompile.lowering.inductor import sources_hash
from ringcompile.lowering.tiles.dense import gradient_dtype
from ringcompile.mesh import Ranks
from ringcompile.ops import accumulation_dtype
from ringcompile.passes.caches import CACHE_ADVICE, find_cache_outputs
from ringcompile.passes.pipeline import Rewritten, run_passes
from ringcompile.passes.places import find_place
from ringcompile.passes.plan_attentions import PlannedAttention
from ringcompile.passes.regions import Refusal
from ringcompile.passes.text import format_graph
from ringcompile.report.records import (
    AttentionReport,
    GatherReport,
    GraphReport,
    Memory,
    ScheduleReport,
    Traffic,
)
from ringcompile.report.schedules import read_steps
from ringcompile.report.trial import Trial, bytes_of, run_trial
from ringcompile.torch_private import size_hint


@dataclass(frozen=True, slots=True)
class GraphReader:
    """Runs the passes for ranks of a group that need not exist.

    Attributes:
        options: the user's.
        world_size: the number of ranks.
        notes: what is told of every graph.
    """

    options: RingOptions
    world_size: int
    notes: tuple[str, ...] = ()

    def read(self, gm: GraphModule, example_inputs: Sequence[object]) -> GraphReport:
        """Report on one graph; it is left as it is.

        Args:
            gm: a Dynamo graph.
            example_inputs: its inputs, in placeholder order.
        """

        @cache
        def format_passes(rank: int) -> dict[str, str]:
            other = self._run(gm, example_inputs, rank)
            self._try(other)
            return _format_passes(other)

        made = self._run(gm, example_inputs, rank=0)
        trial = self._try(made)
        texts = _format_passes(made)
        schedules = tuple(_read_schedules(made))
        return GraphReport(
            attentions=tuple(_read_attentions(made, self.world_size)),
            gathers=tuple(_read_gathers(made)),
            schedules=schedules,
            traffic=_sum_traffic(schedules, trial, self.world_size),
            memory=_read_memory(made, trial),
            notes=(*self.notes, *_read_notes(made)),
            format_passes=lambda rank: texts if rank == 0 else format_passes(rank),
        )

    def _run(
        self, gm: GraphModule, example_inputs: Sequence[object], rank: int
    ) -> Rewritten:
        ranks = Ranks(rank, self.world_size, "explain")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all of them are in the report
            return run_passes(
                gm,
                example_inputs,
                options=self.options,
                ranks=ranks if self.world_size > 1 else Ranks(),
                sources=sources_hash(),
            )

    def _try(self, made: Rewritten) -> Trial:
        is_cut = made.attentions and self.world_size > 1
        return run_trial(made.gm, self.world_size) if is_cut else Trial()


def _format_passes(made: Rewritten) -> dict[str, str]:
    """The texts of all passes; the last has shapes, which are known by now."""
    if not made.texts:  # it runs whole
        return {}
    *_, last = made.texts
    return made.texts | {last: format_graph(made.gm, name=last)}


# ---- attentions ----------------------------------------------------------------------


def _read_attentions(made: Rewritten, world_size: int) -> Iterator[AttentionReport]:
    """In the order of the graph."""
    if not made.texts:  # it runs whole
        return
    order = {line.split()[0].rstrip(":"): n for n, line in _lines(made.texts["shadow"])}
    found: list[tuple[Node, PlannedAttention | Refusal]] = [
        *((a.region.output, a) for a in made.attentions),
        *((r.output, r) for r in made.refusals),
    ]
    found.sort(key=lambda pair: order.get(pair[0].name, len(order)))
    for node, attention in found:
        if isinstance(attention, Refusal):
            yield _read_refusal(node, attention)
        else:
            yield _read_planned(node, attention, is_cut=world_size > 1)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((n, line) for n, line in enumerate(text.splitlines()) if line.strip())


def _read_planned(
    node: Node, attention: PlannedAttention, *, is_cut: bool
) -> AttentionReport:
    place, pattern = find_place(node), str(attention.pattern)
    is_dense = not is_cut and pattern == "exact"
    return AttentionReport(
        name=place.module or node.name,
        where=place.line,
        call_line=place.call_line,
        status="dense" if is_dense else "ring",
        mask=str(attention.region.mask),
        dropout=f"{attention.region.dropout:g}" if attention.region.dropout else "",
        pattern=pattern,
        layout=attention.plan.schedule.place if is_cut else "",
        reason=attention.reason if is_cut else "one rank: nothing to cut",
    )


def _read_refusal(node: Node, refusal: Refusal) -> AttentionReport:
    place = find_place(node)
    return AttentionReport(
        name=place.module or node.name,
        where=place.line,
        call_line=place.call_line,
        status="gathered",
        reason=f"{refusal.what}: {refusal.because}\ninstead: {refusal.instead}",
    )


# ---- the rest ------------------------------------------------------------------------


def _read_gathers(made: Rewritten) -> Iterator[GatherReport]:
    for gathered in made.gathered:
        yield GatherReport(
            where=gathered.where,
            what=gathered.what,
            num_bytes=gathered.num_bytes,
            because=gathered.because,
        )


@dataclass(frozen=True, slots=True)
class _Row:
    """What one row of a KV shard weighs, all batches and KV heads together.

    Attributes:
        kv_bytes: K and V.
        dkv_bytes: their gradients, which travel in the dtype they are summed in.
        one_call_bytes: those that one kernel computes: as it gives them.
    """

    kv_bytes: int
    dkv_bytes: int
    one_call_bytes: int

    @classmethod
    def of(cls, planned: PlannedAttention) -> "_Row":
        region = planned.region
        k, v = (o.node.meta["val"] for o in (region.k, region.v))
        length = size_hint(region.k.shape[2])
        count = (bytes_of(k) + bytes_of(v)) // k.element_size() // length
        wide = one_call = accumulation_dtype(k.dtype).itemsize
        if planned.plan.takes_dense_kernels:
            one_call = gradient_dtype(k, v).itemsize
        return cls(count * k.element_size(), count * wide, count * one_call)


def _read_schedules(made: Rewritten) -> Iterator[ScheduleReport]:
    """Each schedule once, with the attentions that run it on rows of one size."""
    groups: dict[tuple[Schedule, _Row, int], list[str]] = {}
    for attention in made.attentions:
        region = attention.region
        length = size_hint(region.k.shape[2])
        key = (attention.plan.schedule, _Row.of(attention), length)
        name = find_place(region.output).module or region.output.name
        groups.setdefault(key, []).append(name)
    for (schedule, row, length), names in groups.items():
        steps = read_steps(
            schedule,
            kv_bytes=row.kv_bytes,
            dkv_bytes=row.dkv_bytes,
            length=length,
            one_call_bytes=row.one_call_bytes,
        )
        yield ScheduleReport(tuple(names), str(schedule), tuple(steps))


def _sum_traffic(
    schedules: Sequence[ScheduleReport], trial: Trial, world_size: int
) -> Traffic:
    def add(sizes: Iterable[tuple[int, tuple[int, ...]]]) -> tuple[int, ...]:
        total = [0] * world_size
        for times, by_rank in sizes:
            total = [t + times * size for t, size in zip(total, by_rank, strict=True)]
        return tuple(total)

    steps = [(len(s.attentions), step) for s in schedules for step in s.steps]
    return Traffic(
        hops_forward=add((n, step.forward_bytes) for n, step in steps),
        hops_backward=add((n, step.backward_bytes) for n, step in steps),
        gathers=(trial.gathers,) * world_size,
        reduces=(trial.reduces,) * world_size,
    )


def _read_memory(made: Rewritten, trial: Trial) -> Memory:
    return Memory(
        parameters=trial.parameters,
        saved=trial.saved,
        attention=trial.attention,
        gathered=sum(g.num_bytes for g in made.gathered),
    )


def _read_notes(made: Rewritten) -> Iterator[str]:
    yield from made.notes
    numbers = find_cache_outputs([a.region for a in made.attentions])
    if numbers:
        yield f"outputs {', '.join(map(str, numbers))}: {CACHE_ADVICE}"
