"""The passes in order: from a Dynamo graph to one rank's graph.

Invariant: what is refused leaves the graph as it was; every change has a named pass and
its text can be read.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import SymInt, nn
from torch.fx import GraphModule, Node

from ringcompile.config import RingOptions
from ringcompile.errors import OptionError, UnsupportedAttentionError
from ringcompile.ir.attention import Bias, Dropout, RankPlan
from ringcompile.ir.layout import Layout, Side
from ringcompile.ir.mask import FALSE, later_keys
from ringcompile.ir.reshard import ReshardSpec, format_spec
from ringcompile.ir.schedule import MixedParts, PartSpec, Schedule
from ringcompile.ir.text import format_plan
from ringcompile.mesh import Ranks
from ringcompile.passes.autocast import spell_autocast
from ringcompile.passes.caches import CACHE_ADVICE, find_cache_outputs
from ringcompile.passes.canonicalize import canonicalize
from ringcompile.passes.choose_pattern import choose_patterns
from ringcompile.passes.emitter import AxisLayout
from ringcompile.passes.find_attention import find_attention
from ringcompile.passes.op import read_op
from ringcompile.passes.propagate_layout import (
    Axis,
    Placements,
    Window,
    propagate_layout,
)
from ringcompile.passes.raise_attention import raise_attention
from ringcompile.passes.read_added import is_cut
from ringcompile.passes.regions import Refusal, Region
from ringcompile.passes.rewrite import Gathered, Sharding, rewrite
from ringcompile.passes.scorers import insert_scorers
from ringcompile.passes.shadow import find_baked, find_opaque, trace_shadow, where
from ringcompile.passes.text import format_graph
from ringcompile.patterns import AttentionSpec, Pattern
from ringcompile.patterns.base import find_segment
from ringcompile.plan.choose import Crossing, choose_layout
from ringcompile.plan.coverage import DependsOnLength
from ringcompile.plan.stages import build_schedule
from ringcompile.torch_private import (
    observe_pass,
    size_hint,
    without_saved_tensor_hooks,
)

log = logging.getLogger(__name__)


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


@dataclass(slots=True)
class Rewritten:
    """What the passes made of one graph.

    Attributes:
        gm: the graph of this rank.
        attentions: those that became rings.
        refusals: those that run gathered.
        gathered: every value that is made whole, outputs included.
        notes: warnings of what the options say without effect.
        texts: the graph after each named pass.
        graph_text: every call of the graph before it is this rank's.
        draws: whether some op draws random numbers, so that ranks must agree on them.
    """

    gm: GraphModule
    attentions: tuple[PlannedAttention, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    gathered: tuple[Gathered, ...] = ()
    notes: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    graph_text: str = ""
    draws: bool = False

    @property
    def plan_hash(self) -> str:
        """Equal on all ranks iff they are about to run the same schedules."""
        text = self.graph_text + "\n".join(
            f"{a.plan.index} {a.plan.scale!r} {a.plan.group_name} {a.plan.sources}"
            f" {a.plan.schedule!r} {a.plan.block_order} {a.plan.kernel}"
            f" {a.plan.dropout!r} {a.plan.softcap!r} {a.plan.biases!r}"
            for a in self.attentions
        )
        return hashlib.sha256(text.encode()).hexdigest()


def run_passes(
    gm: GraphModule,
    example_inputs: Sequence[object],
    *,
    options: RingOptions,
    ranks: Ranks,
    sources: str,
) -> Rewritten:
    """Turn a Dynamo graph into this rank's graph.

    Args:
        gm: the graph; left as it is.
        example_inputs: its inputs, real or fake.
        options: the user's options.
        ranks: this rank's place among its peers.
        sources: hash of the lowering's source files.

    Raises:
        OptionError: ``attention`` gives a pattern to a module that isn't there.
        UnsupportedAttentionError: an attention can't become a ring and
            ``unsupported="error"``.
    """
    if (opaque := find_opaque(gm)) is not None:
        return Rewritten(gm, notes=(_run_whole(opaque, options),))
    with without_saved_tensor_hooks():
        made = Rewritten(trace_shadow(gm, example_inputs))
    if (baked := find_baked(made.gm)) is not None:
        return Rewritten(gm, notes=(_run_whole(baked, options),))
    _note(made, "shadow")
    made.draws = any(_draws(node) for node in made.gm.graph.nodes)
    regions = _find_regions(made)
    _refuse(made.refusals, options)
    if not regions:
        return made
    chosen = choose_patterns(regions, made.refusals, options)
    made.notes = chosen.unused
    for note in made.notes:
        warnings.warn(note, stacklevel=2)
    with observe_pass(made.gm, "raise_attention"):
        calls = raise_attention(made.gm, regions)
    _note(made, "raise_attention")
    with observe_pass(made.gm, "propagate_layout"):
        placements = propagate_layout(made.gm.graph, _find_cross(calls))
    attentions = {
        node: _Attention(region, pattern)
        for (node, region), pattern in zip(calls.items(), chosen.patterns, strict=True)
    }
    planner = _Planner(options, ranks, sources)
    axes = planner.lay_out(placements, attentions)
    plans = planner.plan(placements, attentions)
    made.attentions = tuple(plans.values())
    texts = {node: format_plan(planned.plan) for node, planned in plans.items()}
    if ranks.is_alone:
        for node, text in texts.items():
            node.kwargs = {"plan": text}
        made.gm.recompile()
    else:
        with observe_pass(made.gm, "rewrite"):
            sharding = _read_sharding(options, ranks, axes)
            made.gm, made.gathered = rewrite(made.gm, placements, texts, sharding)
        _warn_of_cache_outputs(regions, options)
    insert_scorers(made.gm, planner.scorers)
    _note(made, "rewrite")
    _warn_of_gathers(made, options)
    return made


def _find_cross(calls: dict[Node, Region]) -> frozenset[Node]:
    return frozenset(node for node, region in calls.items() if region.is_cross)


def _find_regions(made: Rewritten) -> tuple[Region, ...]:
    """The attentions that become rings; the others are noted as refused."""
    with observe_pass(made.gm, "canonicalize"):
        spell_autocast(made.gm)
        canonicalize(made.gm)
    with observe_pass(made.gm, "find_attention"):
        found = find_attention(made.gm)
    made.refusals = tuple(f for f in found if isinstance(f, Refusal))
    made.graph_text = "\n".join(
        f"{node.name} {node.target} {node.args} {node.kwargs}"
        for node in made.gm.graph.nodes
    )
    return tuple(f for f in found if isinstance(f, Region))


def _run_whole(opaque: Node, options: RingOptions) -> str:
    """Warn of it; return what was said."""
    error = UnsupportedAttentionError(
        f"a graph with {getattr(opaque.target, '__name__', opaque.target)}",
        at=where(opaque),
        because="its own backward or policy can't be carried through the rewrite yet",
        instead="keep it out of what is compiled (torch.compiler.disable)",
    )
    if options.unsupported == "error":
        raise error
    said = f"runs whole on every rank: {error}"
    warnings.warn(said, stacklevel=2)
    return said


def _draws(node: Node) -> bool:
    """Whether a call draws random numbers; dropout of nothing does not."""
    op = read_op(node)
    if op is None or torch.Tag.nondeterministic_seeded not in op.overload.tags:
        return False
    rate = op.args.get("p", op.args.get("dropout_p", 1))
    return rate != 0 and op.args.get("train", True) is not False


def _note(made: Rewritten, name: str) -> None:
    made.texts[name] = format_graph(made.gm, name=name)
    log.debug("%s", made.texts[name])


def _refuse(refusals: Sequence[Refusal], options: RingOptions) -> None:
    for refusal in refusals:
        error = UnsupportedAttentionError(
            refusal.what,
            at=refusal.where,
            because=refusal.because,
            instead=refusal.instead,
        )
        if options.unsupported == "error":
            raise error
        warnings.warn(f"runs gathered: {error}", stacklevel=2)


def _warn_of_gathers(made: Rewritten, options: RingOptions) -> None:
    """One warning for each op and line; refused attentions have had theirs."""
    warned: set[object] = {name for refusal in made.refusals for name in refusal.inside}
    for g in made.gathered:
        line = g.where.split(" (")[0]
        if g.what.startswith("output") or g.node in warned or (line, g.what) in warned:
            continue
        warned.add((line, g.what))
        error = UnsupportedAttentionError(
            f"{g.what} needs the whole sequence: {g.num_bytes} bytes on every rank",
            at=g.where,
            because=g.because,
            instead="an op that works on each token alone, or accept the gather",
        )
        if options.unsupported == "error":
            raise error
        warnings.warn(f"gathers: {error}", stacklevel=2)


def _warn_of_cache_outputs(regions: Sequence[Region], options: RingOptions) -> None:
    if options.outputs == "gathered" and find_cache_outputs(regions):
        warnings.warn(CACHE_ADVICE, stacklevel=2)


def _read_sharding(
    options: RingOptions, ranks: Ranks, axes: tuple[AxisLayout, ...]
) -> Sharding:
    gathers = options.outputs == "gathered"
    if options.grads == "summed":
        return Sharding(axes, gathers)
    by_shards = float(ranks.size) if options.local_scale == "mean" else 1.0
    factors = (by_shards, options.replicated_factor(ranks.size))
    return Sharding(axes, gathers, param_factors=factors, sums_grads=False)


@dataclass(frozen=True, slots=True)
class _Attention:
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


class _Planner:
    """Chooses a layout for each axis, then plans each attention on its axis."""

    def __init__(self, options: RingOptions, ranks: Ranks, sources: str) -> None:
        self._options = options
        self._ranks = ranks
        self._sources = sources
        self._axes: list[AxisLayout] = []
        self._reasons: list[str] = []
        self.scorers: dict[int, nn.Module] = {}

    def lay_out(
        self, placements: Placements, attentions: dict[Node, _Attention]
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
        self, placements: Placements, attentions: dict[Node, _Attention], number: int
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
        attentions: Sequence[_Attention],
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
        return choose_layout(parts, self._ranks.size, size, crossings=tuple(crossings))

    def plan(
        self, placements: Placements, attentions: dict[Node, _Attention]
    ) -> dict[Node, PlannedAttention]:
        """A plan for each call; axes whose schedule depends on S get a fixed S."""
        planned = {}
        for index, (node, attention) in enumerate(attentions.items()):
            axes, region = placements.attention_axes[node], attention.region
            schedule = self._schedule(attention, *axes)
            self._note_scorer(index, attention.pattern, schedule)
            plan = RankPlan(
                index=index,
                name=region.where,
                rank=self._ranks.rank,
                group_name=self._ranks.group_name,
                scale=region.scale,
                timeout_s=self._options.timeout_s,
                schedule=schedule,
                sources=self._sources,
                block_order=self._options.block_order,
                kernel=self._options.kernel,
                dropout=_plan_dropout(region),
                softcap=region.softcap,
                biases=tuple(Bias(is_cut=is_cut(bias)) for bias in region.biases),
            )
            reasons = dict.fromkeys(self._reasons[number] for number in axes)
            planned[node] = PlannedAttention(
                region, attention.pattern, plan, "; keys: ".join(reasons)
            )
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

    def _schedule(
        self, attention: _Attention, number: int, key_number: int
    ) -> Schedule:
        axis, keys = self._axes[number], self._axes[key_number]
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
            return build(*(_read_side(x, is_open=is_open) for x in (axis, keys)))
        except DependsOnLength:
            return build(*(_read_side(x, is_open=False) for x in (axis, keys)))


def _read_side(axis: AxisLayout, *, is_open: bool) -> Side:
    """How an axis lies; a symbolic length is fixed unless it may stay open."""
    stays = is_open and isinstance(axis.length, SymInt)
    return Side(axis.layout, None if stays else int(axis.length))


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
