"""What a compiler makes of the ring: hops per graph, saved tensors, order of events."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

from ringcompile import inductor_passes, ops
from ringcompile.ir.layout import Layout
from ringcompile.lowering import ring
from ringcompile.lowering.hops import Tag
from ringcompile.lowering.inductor import inductor_patches
from ringcompile.lowering.tiles import math
from ringcompile.lowering.transports import process_group
from ringcompile.torch_private import compile_with_inductor
from support.ring_cases import Case, plan_text


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

    def see(self, graph: Graph) -> None:
        """Note the hops and the saved tensors of a graph."""
        started = graph.find_nodes(op="call_function", target=ops.HOP)
        self.tags.append([str(Tag.decode(node.args[5])) for node in started])
        if len(self.tags) == 1:
            saved: list[Node] = []
            torch.fx.node.map_arg(graph.output_node().args[0], saved.append)
            self.saved_bytes = sum(_num_bytes(node) for node in saved[1:])


def _num_bytes(node: Node) -> int:
    value = node.meta.get("val")
    return value.nbytes if isinstance(value, Tensor) else 0


def trace(
    group: ProcessGroup, rank: int, case: Case, without: tuple[str, ...] = ()
) -> Trace:
    """Compile a small model with Inductor and run it, without some of the cures."""
    return _trace(case, _model(case, group, rank), (group.size(), rank), without)


def trace_checkpointed(
    group: ProcessGroup, rank: int, case: Case, without: tuple[str, ...] = ()
) -> Trace:
    """The same under activation checkpointing."""
    model = _checkpointed(_model(case, group, rank))
    return _trace(case, model, (group.size(), rank), without)


Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def _model(case: Case, group: ProcessGroup, rank: int) -> Model:
    plan = plan_text(case, group, rank, timeout_s=60.0)
    captures = case.captures

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ops.RING_ATTENTION(
            q.sin(), k.sin(), v.sin(), captures, [], plan=plan
        )
        return out.sin()

    return model


def _checkpointed(model: Model) -> Model:
    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = checkpoint(model, q, k, v, use_reentrant=False)
        return out + 0

    return checkpointed


def expected(case: Case) -> tuple[Tensor, ...]:
    """Output and gradients of the traced model, in float64."""
    q, k, v, grad = (x.double() for x in case.tensors())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = case.attend_dense(*(x.sin() for x in inputs)).sin()
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def _trace(
    case: Case, model: Model, place: tuple[int, int], without: tuple[str, ...]
) -> Trace:
    seen = Trace()
    size, rank = place
    at = torch.tensor(Layout(case.layout, size).positions(rank, case.length))
    q, k, v, grad = (x[:, :, at] for x in case.tensors())
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def backend(gm: GraphModule, example: list[Tensor]) -> Callable[..., object]:
        patches = inductor_patches({"post_grad_custom_post_pass": seen.see})
        if "order" in without:
            patches["reorder_for_peak_memory"] = True
        return compile_with_inductor(gm, example, patches)

    with ExitStack() as stack:
        for cure in without:
            _remove(cure, stack)
        _record(seen.events, stack)
        out = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
        seen.events.append("backward")
        out.backward(grad)
    seen.results = [out.detach(), *(x.grad for x in inputs if x.grad is not None)]
    return seen


def _remove(cure: str, stack: ExitStack) -> None:
    if cure == "keep":
        stack.enter_context(patch.object(ring, "keep", lambda x, deps=(): x))
    elif cure == "places":
        stack.enter_context(
            patch.object(inductor_passes, "_keeps_place", lambda _node: False)
        )
    else:
        assert cure == "order", cure


def _record(events: list[str], stack: ExitStack) -> None:
    """Note when hops start and are waited for, and when a masked tile is computed."""

    class Recorder(process_group.TimedWork):
        def __init__(
            self,
            place: process_group._Place,
            transfers: Sequence[process_group._Transfer],
            held: Sequence[Tensor],
        ) -> None:
            super().__init__(place, transfers, held)
            self._name = str(Tag.decode(place.tag))
            events.append(f"start {self._name}")

        def wait(self, timeout: timedelta | None = None) -> bool:
            if self._transfers:
                events.append(f"wait {self._name}")
            return super().wait(timeout)

    real = math._Tile.blocks

    def computing(self: math._Tile, order: str) -> object:
        events.append("compute")
        return real(self, order)

    stack.enter_context(patch.object(process_group, "TimedWork", Recorder))
    stack.enter_context(patch.object(math._Tile, "blocks", computing))
