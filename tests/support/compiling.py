"""Compile a model on this rank and keep what the compiler said of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule, Node

from ringcompile import backend
from ringcompile.config import RingOptions
from ringcompile.lowering.expand import expand_rings
from ringcompile.lowering.inductor import inductor_patches
from ringcompile.mesh import find_ranks
from ringcompile.ops import HOP
from ringcompile.passes.pipeline import Rewritten
from ringcompile.torch_private import compile_with_inductor


@dataclass(frozen=True, slots=True)
class Value:
    """One value of a forward or backward graph."""

    name: str
    op: str
    shape: tuple[int, ...]
    is_float: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Graph:
    """What Inductor is given to compile: a forward or a backward graph.

    Attributes:
        is_backward: which of them.
        values: every tensor in it.
        outputs: names of what it returns: of a forward graph the user's outputs, then
            what it saves for backward.
        tags: the tag of each hop, in order.
    """

    is_backward: bool
    values: tuple[Value, ...]
    outputs: tuple[str, ...]
    tags: tuple[int, ...]

    def value(self, name: str) -> Value:
        return next(v for v in self.values if v.name == name)


@dataclass(slots=True)
class Record:
    """What the compiler made of a model, as plain data that travels between processes.

    Attributes:
        num_graphs: graphs that Dynamo handed over.
        rings: user line of each attention that became a ring.
        refused: what each other attention was refused for.
        gathers: op and reason of each gather that is no output.
        masks: text of each ring's mask.
        layouts: layout of each ring.
        ulysses: how many ranks deal out the heads of each.
        text: the last graph after rewriting.
        graphs: forward and backward graphs, under ``compiler="capture"``.
    """

    num_graphs: int = 0
    rings: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    gathers: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    ulysses: list[int] = field(default_factory=list)
    text: str = ""
    graphs: list[Graph] = field(default_factory=list)

    def note(self, made: Rewritten) -> None:
        """Add one graph."""
        self.num_graphs += 1
        self.rings += [a.plan.name for a in made.attentions]
        self.refused += [f"{r.what}: {r.because}" for r in made.refusals]
        self.gathers += [
            f"{g.what}: {g.because}"
            for g in made.gathered
            if not g.what.startswith("output")
        ]
        self.masks += [str(a.region.mask) for a in made.attentions]
        self.layouts += [a.plan.schedule.place for a in made.attentions]
        self.ulysses += [a.plan.schedule.ulysses.size for a in made.attentions]
        self.text = made.texts.get("rewrite", "")


def compile_ring(
    model: nn.Module | Callable[..., Any],
    group: ProcessGroup | DeviceMesh | None,
    *,
    compiler: str = "inductor",
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> tuple[Callable[..., Any], Record]:
    """Compile for the ranks of ``group``.

    Args:
        model: what to compile.
        group: the context-parallel group, or mesh; None for one rank.
        compiler: ``inductor``; ``capture`` to keep the graphs that Inductor is given
            and run those eagerly; ``aot_eager`` or ``eager`` to run the rewritten graph
            without Inductor.
        options: options of the backend, beside ``mesh``.
        dynamic: as in ``torch.compile``.

    Returns:
        The compiled callable, and a record that fills at its first call.
    """
    record = Record()
    chosen = {"mesh": group, **(options or {})}

    def compile_graph(gm: GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        settings = RingOptions.from_user(chosen)
        made = backend._rewrite(gm, inputs, settings, find_ranks(group))
        record.note(made)
        if compiler == "inductor":
            return backend.ring(gm, inputs, options=chosen)
        if compiler == "eager":
            return made.gm.forward
        if compiler == "capture":
            return _capture(made.gm, inputs, record)
        aot_eager: Any = torch._dynamo.lookup_backend("aot_eager")
        return aot_eager(made.gm, inputs)  # type: ignore[no-any-return]

    return torch.compile(model, backend=compile_graph, dynamic=dynamic), record


def compile_expanded(
    gm: GraphModule,
    inputs: Sequence[Any],
    see: Callable[[GraphModule, bool], None] = lambda _graph, _is_backward: None,
) -> Callable[..., Any]:
    """A backend that runs eagerly what Inductor would lower, its rings written out."""

    def run_eagerly(
        graph: GraphModule, _inputs: Sequence[object], **options: object
    ) -> Callable[..., Any]:
        expand_rings(graph.graph, can_call=False)
        graph.recompile()
        see(graph, bool(options.get("is_backward")))

        def run(args: list[object]) -> object:
            return graph(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    patches = inductor_patches({})
    return compile_with_inductor(gm, inputs, patches, inner_compile=run_eagerly)


def _capture(
    gm: GraphModule, inputs: Sequence[object], record: Record
) -> Callable[..., Any]:
    def see(graph: GraphModule, is_backward: bool) -> None:
        record.graphs.append(_read_graph(graph, is_backward=is_backward))

    return compile_expanded(gm, inputs, see)


def _read_graph(graph: GraphModule, *, is_backward: bool) -> Graph:
    values = [
        _read_value(n)
        for n in graph.graph.nodes
        if isinstance(n.meta.get("val"), Tensor)
    ]
    hops = graph.graph.find_nodes(op="call_function", target=HOP)
    return Graph(
        is_backward,
        tuple(values),
        _names_of_outputs(graph),
        tuple(node.args[5] for node in hops),
    )


def _read_value(node: Node) -> Value:
    value = node.meta["val"]
    shape = tuple(int(n) for n in value.shape)
    return Value(node.name, str(node.target), shape, value.dtype.is_floating_point)


def _names_of_outputs(graph: GraphModule) -> tuple[str, ...]:
    outputs: Any = graph.graph.output_node().args[0]
    return tuple(n.name for n in outputs if isinstance(n, Node))
