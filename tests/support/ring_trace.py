"""What a compiler makes of the ring: hops per graph, saved tensors, order of events."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import patch

import torch
from support.ring_cases import Case, plan_text
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

from ringcompile import ops
from ringcompile.ir.layout import Layout
from ringcompile.lowering import hops, ring
from ringcompile.lowering.hops import Tag
from ringcompile.lowering.inductor import inductor_patches
from ringcompile.lowering.tiles import math
from ringcompile.lowering.transports import process_group
from ringcompile.torch_private import compile_with_inductor

CURES = ("tangent", "tag", "order", "keep", "touch")


@dataclass
class Trace:
    """What one rank saw.

    Attributes:
        tags: of the hops of each graph, forward first, in order.
        saved_bytes: what forward saves for backward, inputs included.
        events: ``start``, ``wait`` (with the tag) and ``compute``, forward and backward.
        results: out and gradients of this rank's rows; empty if backward was not run.
    """

    tags: list[list[str]] = field(default_factory=list)
    saved_bytes: int = 0
    events: list[str] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)


class _NotRunError(Exception):
    """Backward was compiled and shall not run."""


def trace(
    group: ProcessGroup,
    rank: int,
    case: Case,
    without: tuple[str, ...] = (),
    *,
    checkpointed: bool = False,
    runs_backward: bool = True,
) -> Trace:
    """Compile a small model with Inductor and run it, without some of the cures."""
    seen = Trace()
    layout = Layout(case.layout, group.size())
    at = torch.tensor(layout.positions(rank, case.length))
    q, k, v, grad = (x[:, :, at] for x in case.tensors())
    inputs = [x.requires_grad_(n) for x, n in zip((q, k, v), case.needs_grad)]
    plan = plan_text(case, group, rank, timeout_s=60.0)
    captures = case.captures

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.sin(), k.sin(), v.sin()
        return ops.RING_ATTENTION(q, k, v, captures, plan=plan).sin()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if checkpointed:
            return checkpoint(block, q, k, v, use_reentrant=False) * 2
        return block(q, k, v) * 2

    def backend(gm: GraphModule, example: list[Tensor]) -> Callable[..., object]:
        patches = inductor_patches({"post_grad_custom_post_pass": see})
        if "order" in without:
            patches["reorder_for_peak_memory"] = True
        return compile_with_inductor(gm, example, patches)

    def see(graph: Graph) -> None:
        started = graph.find_nodes(op="call_function", target=ops.HOP)
        seen.tags.append([str(Tag.decode(node.args[5])) for node in started])
        if len(seen.tags) == 1:
            (results,) = graph.output_node().args
            seen.saved_bytes = sum(_bytes(node) for node in results[1:])
        elif not runs_backward:
            raise _NotRunError

    with ExitStack() as stack:
        for name in without:
            _remove(name, stack)
        _record(seen.events, stack)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        out = compiled(*inputs)
        seen.events.append("backward")
        try:
            out.backward(grad)
        except Exception:  # the compiler wraps what a pass raises
            if runs_backward or len(seen.tags) < 2:
                raise
            return seen
    seen.results = [out.detach(), *(x.grad for x in inputs if x.grad is not None)]
    return seen


def _bytes(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    return value.nbytes if isinstance(value, Tensor) else 0


def _remove(cure: str, stack: ExitStack) -> None:
    if cure == "tangent":
        real = ring._hops_of
        stack.enter_context(patch.object(ring, "_hops_of", lambda text, after=(): real(text)))
    elif cure == "tag":
        one = SimpleNamespace(
            FORWARD_KV=hops.Phase.FORWARD_KV,
            BACKWARD_KV=hops.Phase.FORWARD_KV,
            BACKWARD_DKV=hops.Phase.BACKWARD_DKV,
        )
        stack.enter_context(patch.object(ring, "Phase", one))
    elif cure == "keep":
        stack.enter_context(patch.object(ring, "keep", lambda x, deps=(): x))
    elif cure == "touch":
        stack.enter_context(patch.object(ring, "touch", lambda x, deps: x))


def _record(events: list[str], stack: ExitStack) -> None:
    class Recorder(process_group.TimedWork):
        def __init__(self, place: object, *args: object, **options: object) -> None:
            super().__init__(place, *args, **options)
            self._name = str(Tag.decode(place.tag))
            events.append(f"start {self._name}")

        def wait(self, timeout: timedelta | None = None) -> bool:
            if self._transfers:
                events.append(f"wait {self._name}")
            return super().wait(timeout)

    stack.enter_context(patch.object(process_group, "TimedWork", Recorder))
    real = math._Tile.q_blocks

    def computing(self: math._Tile) -> object:
        events.append("compute")
        return real(self)

    stack.enter_context(patch.object(math._Tile, "q_blocks", computing))



def trace_checkpointed(
    group: ProcessGroup, rank: int, case: Case, without: tuple[str, ...] = ()
) -> Trace:
    """The same under activation checkpointing."""
    return trace(group, rank, case, without, checkpointed=True)


def trace_compiling_checkpointed(
    group: ProcessGroup, rank: int, case: Case, without: tuple[str, ...]
) -> Trace:
    """The same, but backward is only compiled: run, it would hang."""
    return trace(group, rank, case, without, checkpointed=True, runs_backward=False)


def expected(case: Case) -> tuple[Tensor, ...]:
    """Output and gradients of the traced model, in float64."""
    q, k, v, grad = (x.double() for x in case.tensors())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = case.attend_dense(*(x.sin() for x in inputs)).sin() * 2
    return out.detach(), *torch.autograd.grad(out, inputs, grad)
