"""The compiler on one page: what ``torch.compile(model, backend="ring")`` does.

A Dynamo graph goes through the passes (find the attentions, read their masks, plan
their schedules, cut the sequence, rewrite) and then through Inductor, which traces the
ring loops of ``ringcompile.lowering`` into kernels and transfers. Invariant: a graph
that is not rewritten is compiled exactly as Inductor would.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch.fx import GraphModule

from ringcompile.config import RingOptions
from ringcompile.errors import OptionError, UnsupportedAttentionError
from ringcompile.lowering.inductor import (
    inductor_patches,
    require_kernel,
    sources_hash,
)
from ringcompile.lowering.transports.choose import prepare_transport
from ringcompile.mesh import Ranks, find_ranks
from ringcompile.passes.artifacts import emit_artifacts
from ringcompile.passes.block_checks import check_blocks_at_calls
from ringcompile.passes.pipeline import Rewritten, run_passes
from ringcompile.passes.scale_parameters import scale_parameters
from ringcompile.plan.check import check_schedule
from ringcompile.preset import read_options
from ringcompile.torch_private import (
    compile_with_inductor,
    find_running_modules,
    is_split_by_ddp,
    keep_input_notes,
    mode_patches,
)
from ringcompile.verify import agree_at_first_call

log = logging.getLogger("ringcompile")


def ring(
    gm: GraphModule,
    example_inputs: Sequence[object],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., object]:
    """Compile one Dynamo graph; ``torch.compile`` calls this.

    Args:
        gm: the graph.
        example_inputs: its inputs, in placeholder order.
        mode: Inductor's mode.
        options: fields of ``RingOptions``.

    Returns:
        What runs in the graph's place, with its outputs on every rank.

    Raises:
        OptionError: an option is unknown or not built.
        UnsupportedAttentionError: something can't be cut and ``unsupported="error"``.
    """
    chosen = read_options(options, mode)
    ranks = find_ranks(chosen.mesh)
    patches = mode_patches(mode) | chosen.inductor_patches
    if ranks.is_alone and chosen.is_exact and chosen.kernel == "auto":
        return compile_with_inductor(gm, example_inputs, patches)

    if chosen.replicated_factor(ranks.size) != 1:
        _require_whole_model()
    if is_split_by_ddp():
        _say_split(chosen)
    made = _rewrite(gm, example_inputs, chosen, ranks)
    if not made.attentions:
        log.warning("no attention to cut in this graph: compiled as Inductor would")
        scale_parameters(gm, example_inputs, chosen.replicated_factor(ranks.size))
        return compile_with_inductor(gm, example_inputs, patches)

    require_kernel(chosen.kernel, example_inputs)
    prepare = partial(prepare_transport, chosen.transport, ranks, example_inputs)
    patches = inductor_patches(patches, made.gm.graph)
    keep_input_notes(made.gm, gm)
    compiled = compile_with_inductor(made.gm, example_inputs, patches)
    compiled = check_blocks_at_calls(compiled, made.block_checks)
    return agree_at_first_call(
        compiled, made, gm, ranks, timeout_s=chosen.timeout_s, then=prepare
    )


def rewrite(
    gm: GraphModule,
    example_inputs: Sequence[object],
    options: Mapping[str, object] | None = None,
) -> GraphModule:
    """Run the passes alone: this rank's graph, runnable eagerly and printable.

    Args:
        gm: a Dynamo graph; left as it is.
        example_inputs: its inputs, real or fake, in placeholder order.
        options: fields of ``RingOptions``.

    Returns:
        The rewritten graph; an equal one in ATen ops if nothing was to be cut.

    Raises:
        OptionError: an option is unknown or not built.
        UnsupportedAttentionError: something can't be cut and ``unsupported="error"``.
    """
    chosen = read_options(options)
    return _rewrite(gm, example_inputs, chosen, find_ranks(chosen.mesh)).gm


def _require_whole_model() -> None:
    """Refuse to divide gradients of a part of a model; the rest of it can't be."""
    modules = find_running_modules()
    if not modules:
        return
    inside = set(modules[-1].parameters())
    outside = [n for n, p in modules[0].named_parameters() if p not in inside]
    if outside:
        raise OptionError(
            'local_scale="sum" on a part of a model',
            at=type(modules[-1]).__name__,
            because=f"{outside[0]} and others outside of it have whole gradients on"
            " every rank, and a sum over ranks counts those P times",
            instead='local_scale="mean" with a wrapper that averages, or a model'
            " without graph breaks",
        )


def _say_split(options: RingOptions) -> None:
    """Right all the same, but each piece gathers what it gives to the next."""
    error = UnsupportedAttentionError(
        "a model that DDP's optimizer splits",
        at="torch._dynamo.config.optimize_ddp",
        because="each piece is compiled alone: activations are gathered between pieces,"
        " and a mask made in one is a tensor in the next",
        instead="torch._dynamo.config.optimize_ddp = False",
    )
    if options.unsupported == "error":
        raise error
    warnings.warn(f"gathers: {error}", stacklevel=2)


def _rewrite(
    gm: GraphModule,
    example_inputs: Sequence[object],
    options: RingOptions,
    ranks: Ranks,
) -> Rewritten:
    sources = sources_hash()
    made = run_passes(gm, example_inputs, options=options, ranks=ranks, sources=sources)
    if options.verify != "off":
        for schedule in {a.plan.schedule for a in made.attentions}:
            check_schedule(schedule)
    emit_artifacts(made, rank=ranks.rank)
    return made
