"""A layout for each sequence and a plan for each attention on it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import SymInt, nn
from torch.fx import Node

from ringcompile.config import RingOptions
from ringcompile.errors import OptionError
from ringcompile.ir.attention import Bias, Dropout, RankPlan
from ringcompile.ir.layout import Layout, Side
from ringcompile.ir.mask import FALSE, later_keys
from ringcompile.ir.reshard import ReshardSpec, format_spec
from ringcompile.ir.schedule import MixedParts, PartSpec, Schedule, Ulysses
from ringcompile.mesh import Ranks
from ringcompile.passes.deal_heads import refuse_heads
from ringcompile.passes.emitter import AxisLayout
from ringcompile.passes.propagate_layout import Axis, Placements, Window
from ringcompile.passes.read_added import is_cut
from ringcompile.passes.regions import Region
from ringcompile.patterns import AttentionSpec, Pattern
from ringcompile.patterns.base import find_segment
from ringcompile.plan.choose import Crossing, choose_layout, choose_ulysses
from ringcompile.plan.cost import Sizes, find_machine
from ringcompile.plan.coverage import DependsOnLength
from ringcompile.plan.stages import build_schedule
from ringcompile.torch_private import size_hint


@dataclass(frozen=True, slots=True)
class PlannedAttention:
    """One attention that became a ring.

    Attributes:
        region: what was found.
        pattern: ``"exact"``, or what is put on top of its mask.
        plan: what this rank does.
        reason: why it has its layout.
    """

    region: Region
    pattern: object
    plan: RankPlan
    reason: str


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention and what is put on top of its mask."""

    region: Region
    pattern: object

    def build_parts(self, length: int | SymInt) -> Sequence[PartSpec]:
        """Masks and selections over ``length`` tokens."""
        region, pattern = self.region, self.pattern
        if not isinstance(pattern, Pattern):
            return ((region.mask, None),)
        heads, kv_heads = (int(o.shape[1]) for o in (region.q, region.k))
        is_causal = later_keys(region.mask.keeps) == FALSE
        spec = AttentionSpec(heads, kv_heads, length, is_causal)
        parts = pattern.build_parts(region.mask, spec)
        is_mixed = isinstance(parts, MixedParts) and parts.mixing.is_detached
        if is_mixed and region.sinks is not None:
            raise OptionError(
                f"{pattern} on an attention with sinks",
                at=region.where,
                because="a sink has no share in weights that count as constants",
                instead='weights="joint"',
            )
        return parts


class Planner:
    """Chooses a layout for each axis, then plans each attention on its axis."""

    def __init__(self, options: RingOptions, ranks: Ranks, sources: str) -> None:
        self._options = options
        self._ranks = ranks
        self._sources = sources
        self._machine = find_machine(ranks.device_type, options.transport)
        self._axes: list[AxisLayout] = []
        self._reasons: list[str] = []
        self.scorers: dict[int, nn.Module] = {}

    def lay_out(
        self, placements: Placements, attentions: dict[Node, Attention]
    ) -> tuple[AxisLayout, ...]:
        """Fix layout and padding of every axis."""
        for number, axis in enumerate(placements.axes):
            if axis.window is not None:
                self._lay_out_part(axis, axis.window)
                continue
            on_axis = [
                attentions[node]
                for node, on in placements.attention_axes.items()
                if on == (number, number)
            ]
            crossings = self._find_crossings(placements, attentions, number)
            layout, reason = self._choose(on_axis, crossings, axis.length)
            length, padded = _settle_length(axis.length, layout)
            spec = ReshardSpec(
                layout,
                self._ranks.rank,
                self._ranks.group_name,
                self._options.timeout_s,
                self._sources,
            )
            self._axes.append(AxisLayout(layout, length, padded, format_spec(spec)))
            self._reasons.append(reason)
        return tuple(self._axes)

    def _find_crossings(
        self, placements: Placements, attentions: dict[Node, Attention], number: int
    ) -> Iterator[Crossing]:
        """Attentions between an axis and others; one not laid out yet is in order."""
        for node, axes in placements.attention_axes.items():
            if number not in axes or axes == (number, number):
                continue
            other = axes[axes[0] == number]
            size = size_hint(placements.axes[other].length)
            layout = Layout("contiguous", self._ranks.size)
            if other < number:
                layout = self._axes[other].layout
            side, parts = Side(layout, size), attentions[node].build_parts(size)
            sides = (None, side) if axes[0] == number else (side, None)
            yield Crossing(tuple(parts), *sides)

    def _lay_out_part(self, axis: Axis, window: Window) -> None:
        """A part of an axis lies where it does there."""
        outer = self._axes[window.axis]
        length = axis.length
        if isinstance(outer.length, int):
            length = int(length)
        part = replace(
            outer,
            length=length,
            padded=True,
            window=window,
            rows=outer.shard_size,
        )
        self._axes.append(part)
        self._reasons.append("a part of another sequence, on the same ranks")

    def _choose(
        self,
        attentions: Sequence[Attention],
        crossings: Iterable[Crossing],
        length: int | SymInt,
    ) -> tuple[Layout, str]:
        name = self._options.layout
        if self._ranks.is_alone:
            return Layout("contiguous", 1), "one rank holds all tokens, in order"
        if name != "auto":
            segments = [find_segment(a.pattern) for a in attentions]
            segment = max((s for s in segments if s is not None), default=None)
            curve = (segment, self._options.hilbert_level) if name == "hilbert" else ()
            layout = Layout(name, self._ranks.size, *curve)
            return layout, f'layout="{name}" in the options'
        size = size_hint(length)
        parts = [a.build_parts(size) for a in attentions]
        return choose_layout(
            *(parts, self._ranks.size, size),
            crossings=tuple(crossings),
            machine=self._machine,
        )

    def plan(
        self, placements: Placements, attentions: dict[Node, Attention]
    ) -> dict[Node, PlannedAttention]:
        """A plan for each call; axes whose schedule depends on S get a fixed S."""
        planned = {}
        for index, (node, attention) in enumerate(attentions.items()):
            axes, region = placements.attention_axes[node], attention.region
            schedule, remark = self._choose_schedule(attention, *axes)
            size = schedule.ulysses.size
            self._note_scorer(index, attention.pattern, schedule)
            plan = RankPlan(
                index=index,
                name=region.where,
                rank=self._ranks.rank // size,
                member=self._ranks.rank % size,
                group_name=self._ranks.group_name,
                scale=region.scale,
                timeout_s=self._options.timeout_s,
                schedule=schedule,
                sources=self._sources,
                block_order=self._options.block_order,
                kernel=self._options.kernel,
                transport=self._options.transport,
                dropout=_plan_dropout(region),
                softcap=region.softcap,
                biases=tuple(Bias(is_cut=is_cut(bias)) for bias in region.biases),
            )
            reason = "; keys: ".join(
                dict.fromkeys(self._reasons[number] for number in axes)
            )
            reason = "; ".join(filter(None, (reason, remark)))
            planned[node] = PlannedAttention(region, attention.pattern, plan, reason)
        return planned

    def _note_scorer(self, index: int, pattern: object, schedule: Schedule) -> None:
        """Keep the module of a learned choice, by the number of its attention."""
        choice = schedule.parts[0].mask.choice
        if choice is None or not choice.is_learned:
            return
        if self._options.grads == "local":
            raise OptionError(
                'a learned Adaptive with grads="local"',
                at="options",
                because="its module has the whole gradient on every rank, and a wrapper"
                " that sums or averages partial ones would count it P times or once",
                instead='grads="summed", or scorer=None',
            )
        scorer = getattr(pattern, "scorer", None)
        assert isinstance(scorer, nn.Module), "a learned choice has its module"
        self.scorers[index] = scorer

    def _choose_schedule(
        self, attention: Attention, number: int, key_number: int
    ) -> tuple[Schedule, str]:
        """A ring over all ranks or over groups that deal out heads, and a remark."""
        axes, asked = (number, key_number), self._ranks.ulysses_size
        ring = self._schedule(attention, *axes, ulysses_size=1)
        if asked is not None and asked > 1:
            refusal = self._refuse_ulysses(attention, *axes, size=asked)
            if refusal:
                return ring, f"a ring over all ranks: {refusal}"
            return self._schedule(attention, *axes, ulysses_size=asked), ""
        # What is best for this call's sizes need not be for another's.
        region, length = attention.region, self._axes[number].length
        heads = (region.q.shape[1], region.k.shape[1])
        is_fixed = all(isinstance(n, int) for n in (*heads, length))
        if asked == 1 or not self._machine.trade_s or not is_fixed:
            return ring, ""
        others = [
            self._schedule(attention, *axes, ulysses_size=size)
            for size in range(2, self._ranks.size + 1)
            if self._ranks.size % size == 0
            and self._refuse_ulysses(attention, *axes, size=size) is None
        ]
        if not others:
            return ring, ""
        of_region, length = _find_sizes(region), int(length)
        return choose_ulysses((ring, *others), length, of_region, self._machine)

    def _refuse_ulysses(
        self, attention: Attention, number: int, key_number: int, *, size: int
    ) -> str | None:
        """Why so many ranks can't deal out its heads; None: they can."""
        axis = self._axes[number]
        if number != key_number:
            return "its keys are another sequence"
        if axis.layout.name not in {"contiguous", "zigzag"}:
            return f"shards of neighbours are no shard of the layout {axis.layout.name}"
        if axis.padded:
            return "the sequence does not fill its shards"
        return refuse_heads(attention.region, attention.build_parts(axis.length), size)

    def _schedule(
        self, attention: Attention, number: int, key_number: int, *, ulysses_size: int
    ) -> Schedule:
        axis, keys = self._axes[number], self._axes[key_number]
        ulysses = Ulysses()
        if ulysses_size > 1:
            ulysses = Ulysses(ulysses_size, axis.layout.chunks_per_rank)
            axis = keys = replace(axis, layout=axis.layout.merge(ulysses_size))
        stages = self._options.stages
        num_stages = stages if isinstance(stages, int) else None
        parts = attention.build_parts(axis.length)

        def build(q: Side, kv: Side) -> Schedule:
            of_keys = None if key_number == number else kv
            return build_schedule(
                *(parts, q.layout, q.length), num_stages=num_stages, keys=of_keys
            )

        is_open = all(selection is None for _, selection in parts)
        try:
            built = build(*(_read_side(x, is_open=is_open) for x in (axis, keys)))
        except DependsOnLength:
            built = build(*(_read_side(x, is_open=False) for x in (axis, keys)))
        return replace(built, ulysses=ulysses)


def _read_side(axis: AxisLayout, *, is_open: bool) -> Side:
    """How an axis lies; a symbolic length is fixed unless it may stay open."""
    stays = is_open and isinstance(axis.length, SymInt)
    return Side(axis.layout, None if stays else int(axis.length))


def _find_sizes(region: Region) -> Sizes:
    batch, heads, _, features = map(size_hint, region.q.shape)
    dtype = region.q.node.meta["val"].dtype
    return Sizes(heads, size_hint(region.k.shape[1]), features, dtype.itemsize, batch)


def _plan_dropout(region: Region) -> Dropout | None:
    """The seed comes behind what the mask reads."""
    if not region.dropout:
        return None
    return Dropout(region.dropout, seed=len(region.captures))


def _settle_length(length: int | SymInt, layout: Layout) -> tuple[int | SymInt, bool]:
    """Keep S symbolic where runs need no pads (that is guarded); else fix it."""
    if isinstance(length, SymInt) and not (
        layout.has_runs and bool(length % layout.num_chunks == 0)
    ):
        length = int(length)
    if isinstance(length, SymInt):
        return length, False
    return length, length % layout.num_chunks != 0
