"""The passes in order: from a Dynamo graph to one rank's graph.

Invariant: what is refused leaves the graph as it was; every change has a named pass and
its text can be read.
"""

import hashlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from ringcompile.config import RingOptions
from ringcompile.errors import ShardingError, UnsupportedAttentionError
from ringcompile.ir.text import format_plan
from ringcompile.mesh import Ranks
from ringcompile.passes.autocast import spell_autocast
from ringcompile.passes.block_checks import BlockCheck
from ringcompile.passes.caches import CACHE_ADVICE, find_cache_outputs
from ringcompile.passes.canonicalize import canonicalize
from ringcompile.passes.choose_pattern import choose_patterns
from ringcompile.passes.emitter import AxisLayout
from ringcompile.passes.find_attention import find_attention
from ringcompile.passes.op import read_op
from ringcompile.passes.places import where
from ringcompile.passes.plan_attentions import Attention, PlannedAttention, Planner
from ringcompile.passes.propagate_layout import propagate_layout
from ringcompile.passes.raise_attention import raise_attention
from ringcompile.passes.regions import Refusal, Region
from ringcompile.passes.rewrite import Gathered, Sharding, rewrite
from ringcompile.passes.scorers import insert_scorers
from ringcompile.passes.shadow import find_baked, find_opaque, trace_shadow
from ringcompile.passes.sharded_inputs import (
    LOCAL,
    Lengths,
    find_lengths,
    no_attention,
)
from ringcompile.passes.text import format_calls, format_graph
from ringcompile.torch_private import observe_pass, without_saved_tensor_hooks

log = logging.getLogger(__name__)


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
        shards: names of the inputs that come as shards.
        block_checks: what must hold of block lists that are passed in.
    """

    gm: GraphModule
    attentions: tuple[PlannedAttention, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    gathered: tuple[Gathered, ...] = ()
    notes: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    graph_text: str = ""
    draws: bool = False
    shards: frozenset[str] = frozenset()
    block_checks: tuple[BlockCheck, ...] = ()

    @property
    def plan_hash(self) -> str:
        """Equal on all ranks iff they are about to run the same schedules."""
        text = self.graph_text + "\n".join(
            f"{a.plan.index} {a.plan.scale!r} {a.plan.group_name} {a.plan.sources}"
            f" {a.plan.schedule!r} {a.plan.block_order} {a.plan.kernel}"
            f" {a.plan.transport} {a.plan.dropout!r} {a.plan.softcap!r}"
            f" {a.plan.biases!r}"
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
    made, lengths = _trace(gm, example_inputs, options, ranks)
    if made.notes:
        return made
    _note(made, "shadow")
    made.draws = any(_draws(node) for node in made.gm.graph.nodes)
    regions = _find_regions(made)
    _refuse(made.refusals, options)
    if not regions:
        if lengths is not None:
            raise no_attention(made.refusals)
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
        node: Attention(region, pattern)
        for (node, region), pattern in zip(calls.items(), chosen.patterns, strict=True)
    }
    planner = Planner(options, ranks, sources)
    axes = planner.lay_out(placements, attentions)
    _require_whole_chunks(axes, lengths)
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


def _trace(
    gm: GraphModule,
    example_inputs: Sequence[object],
    options: RingOptions,
    ranks: Ranks,
) -> tuple[Rewritten, Lengths | None]:
    """The flat graph; one that can't be flat is given back with a note."""
    if (opaque := find_opaque(gm)) is not None:
        return Rewritten(gm, notes=(_run_whole(opaque, options),)), None
    try:
        with without_saved_tensor_hooks():
            lengths = _find_lengths(gm, example_inputs, options, ranks)
            made = Rewritten(trace_shadow(gm, example_inputs, lengths))
    except UnsupportedAttentionError as e:  # to whose text fx adds a trace
        error = UnsupportedAttentionError(
            e.what, at=e.at, because=e.because, instead=e.instead
        )
        return Rewritten(gm, notes=(_warn_of_whole(error, options),)), None
    if (baked := find_baked(made.gm)) is not None:
        return Rewritten(gm, notes=(_run_whole(baked, options),)), None
    made.block_checks = made.gm.meta["block_checks"]
    if made.block_checks and lengths is not None:
        raise ShardingError(
            "block lists that are passed in",
            at="the inputs",
            because='with inputs="sharded" they are of this rank\'s rows alone',
            instead="create_block_mask inside of what is compiled",
        )
    made.shards = frozenset(
        n.name for n in made.gm.graph.find_nodes(op="placeholder") if LOCAL in n.meta
    )
    return made, lengths


def _find_lengths(
    gm: GraphModule,
    example_inputs: Sequence[object],
    options: RingOptions,
    ranks: Ranks,
) -> Lengths | None:
    """The lengths that are a rank's own, if ranks pass shards."""
    if options.inputs == "replicated" or ranks.is_alone:
        return None
    local = Rewritten(trace_shadow(gm, example_inputs))
    return find_lengths(_find_regions(local), local.refusals, ranks.size)


def _require_whole_chunks(axes: Sequence[AxisLayout], lengths: Lengths | None) -> None:
    """Pads among the shards that ranks pass can't be told from tokens."""
    for axis in axes if lengths is not None else ():
        if axis.window is None and axis.padded:
            raise ShardingError(
                f"{axis.length} tokens as {axis.layout} shards",
                at="the inputs",
                because=f"they are no multiple of {axis.layout.num_chunks} chunks, so"
                " the last would need pads, which tokens of a shard are not",
                instead="pad the sequence before ringcompile.shard, and mask the pads",
            )


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
    made.graph_text = format_calls(made.gm.graph)
    return tuple(f for f in found if isinstance(f, Region))


def _run_whole(opaque: Node, options: RingOptions) -> str:
    """Warn of it; return what was said."""
    error = UnsupportedAttentionError(
        f"a graph with {getattr(opaque.target, '__name__', opaque.target)}",
        at=where(opaque),
        because="its own backward or policy can't be carried through the rewrite yet",
        instead="keep it out of what is compiled (torch.compiler.disable)",
    )
    return _warn_of_whole(error, options)


def _warn_of_whole(error: UnsupportedAttentionError, options: RingOptions) -> str:
    if options.unsupported == "error" or options.inputs == "sharded":
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
