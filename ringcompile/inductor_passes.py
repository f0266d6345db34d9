"""What Inductor gets of us: passes over its graphs and schedules, lowerings of our ops.

The rest of torch's private names is in ``torch_private``. Invariant: a user's passes
run too, before ours, and a pass without a uuid keeps graphs out of compile caches.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._C import _DisableAutocast
from torch._functorch.compile_utils import fx_graph_cse
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import (
    FunctionalTensorMode,
    dispatch_functionalize,
)
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy

GraphPass = Callable[[Graph], None]

OWN_MEMORY = "ringcompile.own_memory"
"""In the meta of a graph: no result lies in an operand or in another result."""

_IN_ORDER = "ringcompile.in_order"
"""In the meta of a node: if it becomes a kernel of its own, that keeps its place."""


def passes_of(patches: Mapping[str, object], name: str) -> list[Any]:
    """The passes that a user has asked for under that name, here or globally."""
    from torch._inductor import config  # noqa: PLC0415 - it takes seconds to import

    asked: Any = patches.get(name, getattr(config, name))
    if asked is None:
        return []
    return list(asked) if isinstance(asked, list | tuple) else [asked]


def pass_uuid(some_pass: Callable[..., Any]) -> str:
    """What compile caches know a pass by; empty if nothing."""
    find_uuid = getattr(some_pass, "uuid", None)
    uuid = find_uuid() if find_uuid is not None else None
    return repr(uuid) if uuid else ""


def mark_saved_pass(
    op: OpOverload, uuid: str, others: Sequence[GraphPass] = ()
) -> GraphPass:
    """A pass over the joint graph: results of ``op`` are saved, never recomputed.

    Args:
        op: op with one tensor result.
        uuid: what the compile cache knows the pass by; empty keeps graphs out of it.
        others: the user's own passes, run first.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass  # noqa: PLC0415

    class MarkSaved(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            for other in others:
                other(graph)
            mark_saved(graph, op)

        def uuid(self) -> str | None:
            return uuid or None

    return MarkSaved()


def mark_saved(graph: Graph, op: OpOverload) -> None:
    """Let the partitioner save every result of ``op``."""
    for node in graph.find_nodes(op="call_function", target=op):
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def first_pass(
    run: Callable[..., None], uuid: str, others: Sequence[Any] = ()
) -> GraphPass:
    """A pass over graphs of forward or backward, before Inductor's own.

    Args:
        run: what it does; ``can_call`` tells whether Inductor can call a graph from
            another, which it can't where it writes C++ or makes CUDA graphs, and
            ``may_be_cut`` whether it may cut the graph in CUDA graphs, over whose ends
            nothing is under way.
        uuid: what the compile cache knows the pass by; empty keeps graphs out of it.
        others: the user's own passes, run first.
    """
    from torch._inductor import config, custom_graph_pass  # noqa: PLC0415

    # 2.11 has none.
    aware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
    base: Any = aware or custom_graph_pass.CustomGraphPass

    class FirstPass(base):  # type: ignore[misc]
        def __call__(self, graph: Graph, is_inference: bool = False) -> None:
            for other in others:
                if aware is not None and isinstance(other, aware):
                    other(graph, is_inference)
                else:
                    other(graph)
            captures = config.triton.cudagraphs
            can_call = not (config.cpp_wrapper or captures)
            may_be_cut = captures and not _fits_one_cuda_graph(graph)
            run(graph, can_call=can_call, may_be_cut=may_be_cut)

        def uuid(self) -> str | None:
            return uuid or None

    made: GraphPass = FirstPass()
    return made


def _fits_one_cuda_graph(graph: Graph) -> bool:
    """Whether a CUDA graph can hold all of it, as far as its nodes tell.

    Ranks that run the same graph find the same.
    """
    from torch._inductor import config  # noqa: PLC0415
    from torch._inductor.utils import (  # noqa: PLC0415
        get_first_incompatible_cudagraph_node,
    )

    module = graph.owning_module
    if module is None or get_first_incompatible_cudagraph_node(module) is not None:
        return False
    if config.triton.cudagraph_skip_dynamic_graphs:
        return False
    if getattr(config, "custom_should_partition_ops", None):  # 2.11 may have none
        return False
    if any(isinstance(node.target, HigherOrderOperator) for node in graph.nodes):
        return False
    values = [node.meta.get("val") for node in graph.nodes]
    values += [attrgetter(n.target)(module) for n in graph.find_nodes(op="get_attr")]
    devices = {x.device for x in tree_leaves(values) if isinstance(x, Tensor)}
    return len(devices) == 1 and devices.pop().type == "cuda"


def trace_graph(
    run: Callable[..., tuple[Tensor, ...]], values: Sequence[Tensor]
) -> GraphModule:
    """What ``run`` does, as a graph that Inductor's passes over such have not seen.

    Its matrix products and attention keep their places among what it sends, wherever
    its nodes are copied to.

    Args:
        run: computes tensors, without gradients.
        values: what it is called with; fake tensors of one mode.
    """
    from torch._inductor.decomposition import select_decomp_table  # noqa: PLC0415
    from torch._inductor.fx_passes.post_grad import view_to_reshape  # noqa: PLC0415

    modes = [x.fake_mode for x in values if isinstance(x, FakeTensor)]
    functional: Any = dispatch_functionalize(run, FunctionalTensorMode())
    trace = make_fx(functional, decomposition_table=select_decomp_table())
    # Backward is traced inside of the user's call of it, autocast or not.
    with modes[0], torch.no_grad(), _DisableAutocast():
        graph = trace(*values)
    graph.graph = fx_graph_cse(graph.graph)
    for node in graph.graph.nodes:
        node.meta[_IN_ORDER] = True
    graph.recompile()
    view_to_reshape(graph)
    return graph


def pass_over(graph: GraphModule) -> None:
    """Do with a graph that is called what Inductor does with the one that calls it.

    A user's passes run over it too, told that it is not for inference alone.
    """
    from torch._inductor.compile_fx import (  # noqa: PLC0415
        _recursive_post_grad_passes,
    )

    _recursive_post_grad_passes(graph)


def call_graph(*args: object) -> object:
    """What Inductor lowers where a graph calls another; a target of nodes.

    Args:
        args: as of ``invoke_subgraph``: the graph, its name, operands.
    """
    from torch._inductor.lowering import lowerings  # noqa: PLC0415

    return lowerings[torch.ops.higher_order.invoke_subgraph](*args)


call_graph._inductor_lowering_function = True  # type: ignore[attr-defined] # noqa: SLF001


def order_pass(
    communicates: Callable[[GraphModule], bool], uuid: str, others: Sequence[Any] = ()
) -> Callable[[list[Any]], list[Any]]:
    """A pass over schedules: communication and what it flies under stay in order.

    Inductor itself keeps collectives in the order of the graph, as it must be the same
    on all ranks, but does not look for them inside of called graphs. Nor does it mind
    what it computes between a start and its wait: what is fused with something that
    stands early takes all that it reads along, a large kernel out of there too.

    Args:
        communicates: whether a graph does.
        uuid: what the compile cache knows the pass by; empty keeps graphs out of it.
        others: the user's own passes, run first.
    """
    from torch._inductor import custom_graph_pass, ir  # noqa: PLC0415
    from torch._inductor.utils import contains_collective  # noqa: PLC0415

    # In 2.11 they are one class.
    base: Any = getattr(custom_graph_pass, "CustomSchedulerPass", None)
    base = base or custom_graph_pass.CustomGraphPass

    def is_call(node: Any) -> bool:  # noqa: ANN401 - Inductor's
        if not isinstance(node.node, ir.InvokeSubgraph):
            return False
        call: Any = node.node
        if call.subgraph.graph_module.meta.get(OWN_MEMORY):
            _guard_memory(call.subgraph.graph)
        return communicates(call.subgraph.graph_module)

    class KeepOrder(base):  # type: ignore[misc]
        def __call__(self, nodes: list[Any]) -> list[Any]:
            for other in others:
                nodes = other(nodes)
            calls = {node for node in nodes if is_call(node)}
            ours = [n for n in nodes if n in calls or _keeps_place(n)]
            ordered = [n for n in nodes if n in calls or contains_collective(n)]
            around = (x for x in pairwise(ordered) if not calls.isdisjoint(x))
            for first, second in (*pairwise(ours), *around):
                _add_order(first, second)
            if ours:
                _spread_ancestors(nodes)
            return nodes

        def uuid(self) -> str | None:
            return uuid or None

    made: Callable[[list[Any]], list[Any]] = KeepOrder()
    return made


def _keeps_place(node: Any) -> bool:  # noqa: ANN401 - Inductor's
    """Whether it is a kernel, or a wait, of a graph of ``trace_graph``."""
    from torch._inductor import ir  # noqa: PLC0415

    if not (node.is_extern() or node.is_template()):
        return False
    if isinstance(node.node, ir.MultiOutput | ir.NopKernel):
        return False
    return any(origin.meta.get(_IN_ORDER) for origin in node.node.origins)


def _add_order(first: Any, second: Any) -> None:  # noqa: ANN401 - Inductor's
    from torch._inductor.dependencies import WeakDep  # noqa: PLC0415

    after = next(iter(second.get_buffer_names()))
    for name in first.get_buffer_names():
        second.add_fake_dep(WeakDep(name, after, is_fake=True))


def _spread_ancestors(nodes: Sequence[Any]) -> None:
    """Let fusion know of dependencies that are new; it would make circles of them."""
    for node in nodes:
        scheduler = node.scheduler
        for dep in node.unmet_dependencies:
            if (buffer := scheduler.name_to_buf.get(dep.name)) is not None:
                name = buffer.defining_op_name()
                before = scheduler.name_to_fused_node[name].ancestors
                node.ancestors |= {name} | before


def _guard_memory(graph: Any) -> None:  # noqa: ANN401 - Inductor's
    """See to it that a called graph writes nothing but what it gives.

    Results that lie in an operand or in each other would be reused; and Inductor takes
    operands for donated by the numbers of those of the graph that calls.
    """
    from torch._inductor import ir  # noqa: PLC0415

    names = [x.get_name() for x in graph.graph_outputs]
    assert len(set(names)) == len(names), "two results of a called graph are one"
    assert graph.graph_inputs.keys().isdisjoint(names), "a result is an operand"
    operands = graph.graph_inputs_original
    for name, x in operands.items():
        if isinstance(x, ir.DonatedBuffer):
            operands[name] = ir.InputBuffer(name=x.name, layout=x.layout)


# ---- our ops -------------------------------------------------------------------------


def register_collective_lowering(op: OpOverload) -> None:
    """Teach Inductor an op that starts communication.

    Its first argument is a tensor, or a list whose i-th tensor must stay whole until
    the i-th result is waited for; Inductor's wait kernel looks for them there.
    """
    # Inductor takes seconds to import, so only who compiles with it pays.
    from torch._inductor import ir, lowering  # noqa: PLC0415

    lowering.add_layout_constraint(op, lowering.constrain_to_fx_strides)

    def lower(sent: Any, *args: object) -> object:  # noqa: ANN401 - Inductor's IR
        sent = tree_map(ir.ExternKernel.require_contiguous, sent)
        started = ir._CollectiveKernel.create_out_of_place(  # noqa: SLF001
            op, sent, *args
        )
        return tree_map(ir.TensorBox.create, started)

    lowering.register_lowering(op, type_promotion_kind=None)(lower)


def register_identity_lowering(op: OpOverload) -> None:
    """Teach Inductor an op whose result is its first argument, at no cost."""
    from torch._inductor import lowering  # noqa: PLC0415

    lowering.register_lowering(op, type_promotion_kind=None)(lambda x, _deps: x)


def register_store_lowering(op: OpOverload) -> None:
    """Teach Inductor an op that is a copy, in memory before it is read.

    What is not there templates inline, and not all of it compiles in them (torch 2.11).
    """
    from torch._inductor import lowering  # noqa: PLC0415

    def lower(x: Any) -> object:  # noqa: ANN401 - Inductor's IR
        stored = lowering.clone(x)
        stored.realize()
        stored.freeze_layout()  # which templates of backwards leave open
        return stored

    lowering.register_lowering(op, type_promotion_kind=None)(lower)


def register_join_lowering(op: OpOverload) -> None:
    """Teach Inductor an op that is ``cat``, each tensor written where it belongs."""
    from torch._inductor import ir, lowering  # noqa: PLC0415

    def lower(xs: Any, dim: int) -> object:  # noqa: ANN401 - Inductor's IR
        return ir.TensorBox(ir.ConcatKernel.create(xs, dim))

    lowering.register_lowering(op, type_promotion_kind=None)(lower)
