"""Equal rings are compiled once, and give the bits that they give one by one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.ranks import RankPool
from support.ring_cases import Case, plan_text
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

from ringcompile import ops
from ringcompile.ir.layout import Layout
from ringcompile.ir.text import format_plan
from ringcompile.lowering import inductor
from ringcompile.lowering.hops import Phase, Tag
from ringcompile.lowering.program import read_plan
from ringcompile.lowering.sharing import communicates, share_rings
from ringcompile.torch_private import compile_with_inductor

CAUSAL = Case("causal", "zigzag")


@dataclass(slots=True)
class Seen:
    """Of each graph that Inductor lowered: bodies called, and what is ordered.

    Attributes:
        calls: names of called bodies, of forward and of backward.
        hops: hops outside of those.
        chained: calls, and how many of them wait for the communication before them.
        results: out and gradients.
    """

    calls: list[list[str]] = field(default_factory=list)
    hops: list[int] = field(default_factory=list)
    chained: list[tuple[int, int]] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)

    def see(self, graph: Graph) -> None:
        share_rings(graph)
        call: Any = torch.ops.higher_order.invoke_subgraph
        self.calls.append([str(n.args[1]) for n in graph.nodes if n.target is call])
        self.hops.append(len(graph.find_nodes(op="call_function", target=ops.HOP)))

    def see_schedule(self, nodes: list[Any]) -> list[Any]:
        calls = [n for n in nodes if type(n.node).__name__ == "InvokeSubgraph"]
        weak = [
            any(getattr(dep, "is_fake", False) for dep in n.unmet_dependencies)
            for n in calls
        ]
        if calls:
            self.chained.append((len(calls), sum(weak)))
        return nodes


Model = Callable[..., Tensor]


def stacked(plans: list[str]) -> Model:
    """Rings one upon the other."""

    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for plan in plans:
            out = ops.RING_ATTENTION(x.sin(), k.cos(), v.sin(), [], [], plan=plan)
            x, k, v = x + out, k * 1.5, v + k
        return x

    return model


def side_by_side(plans: list[str]) -> Model:
    """Rings that need nothing of each other."""

    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = [
            ops.RING_ATTENTION(x * n, k.cos(), v * n, [], [], plan=plan)
            for n, plan in enumerate(plans, 1)
        ]
        return torch.stack(outs).sum(0)

    return model


def checkpointed(plans: list[str]) -> Model:
    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for plan in plans:
            x = x + checkpoint(stacked([plan]), x, k, v, use_reentrant=False)
        return x

    return model


def run_rings(
    group: ProcessGroup,
    rank: int,
    build: Callable[[list[str]], Model],
    cases: tuple[Case, ...],
    shares: bool,
) -> Seen:
    seen, (first, *_) = Seen(), cases
    plans = [
        format_plan(
            replace(read_plan(plan_text(c, group, rank, timeout_s=60.0)), index=n)
        )
        for n, c in enumerate(cases)
    ]

    def backend(gm: GraphModule, example: list[Tensor]) -> Callable[..., object]:
        run = seen.see if shares else lambda _graph: None
        with patch.object(inductor, "share_rings", run):
            patches = inductor.inductor_patches({})
        order: Any = patches["_pre_fusion_custom_pass"]
        patches["_pre_fusion_custom_pass"] = lambda nodes: seen.see_schedule(
            order(nodes)
        )
        return compile_with_inductor(gm, example, patches)

    at = torch.tensor(Layout(first.layout, group.size()).positions(rank, first.length))
    *inputs, grad = (x[:, :, at] for x in first.tensors())
    for x in inputs:
        if first.any_length:
            torch._dynamo.mark_dynamic(x, 2)
        x.requires_grad_()
    torch.compiler.reset()
    out = torch.compile(build(plans), backend=backend, fullgraph=True)(*inputs)
    out.backward(grad)
    grads = [x.grad for x in inputs if x.grad is not None]
    seen.results = [out.detach(), *grads]
    return seen


def run_both(
    ranks: RankPool, build: Callable[[list[str]], Model], *cases: Case
) -> list[Seen]:
    """What was seen with sharing; its results are those without, to the bit."""
    shared = ranks.run(run_rings, build, cases, True, world_size=2)
    alone = ranks.run(run_rings, build, cases, False, world_size=2)
    for a, b in zip(shared, alone, strict=True):
        assert len(a.results) == 4
        assert all(map(torch.equal, a.results, b.results))
    return shared


def test_equal_rings_are_one(ranks: RankPool) -> None:
    for seen in run_both(ranks, stacked, CAUSAL, CAUSAL, CAUSAL):
        assert seen.calls == [["shared_ring_0"] * 3] * 2
        assert seen.hops == [0, 0]


@pytest.mark.slow
def test_different_rings_are_not(ranks: RankPool) -> None:
    window = replace(CAUSAL, mask="window")
    for seen in run_both(ranks, stacked, CAUSAL, window, CAUSAL, window):
        forward, backward = seen.calls
        assert sorted(forward) == ["shared_ring_0"] * 2 + ["shared_ring_1"] * 2
        # The windows are; of the causal ones the last reads the tangent itself.
        assert backward == ["shared_ring_0"] * 2


def test_a_single_ring_stays(ranks: RankPool) -> None:
    for seen in run_both(ranks, stacked, CAUSAL):
        assert seen.calls == [[], []]
        assert min(seen.hops) > 0


@pytest.mark.slow
def test_other_kernels_and_tables(ranks: RankPool) -> None:
    math = replace(CAUSAL, heads=(4, 2, 8, 16), mask="all")
    for seen in run_both(ranks, side_by_side, math, math):
        assert [len(calls) for calls in seen.calls] == [2, 2]
    dilated = Case("longnet", "contiguous")
    for seen in run_both(ranks, stacked, dilated, dilated):
        assert seen.hops[0] == 0  # in backward, the first one makes the other's tables


def test_independent_rings_stay_in_order(ranks: RankPool) -> None:
    for seen in run_both(ranks, side_by_side, CAUSAL, CAUSAL, CAUSAL):
        assert [len(calls) for calls in seen.calls] == [3, 3]
        assert seen.chained == [(3, 2), (3, 2)]


@pytest.mark.slow
def test_checkpointed_rings(ranks: RankPool) -> None:
    for seen in run_both(ranks, checkpointed, CAUSAL, CAUSAL):
        assert len(seen.calls) == 2


@pytest.mark.slow
def test_any_length_is_compiled_one_by_one(ranks: RankPool) -> None:
    case = replace(CAUSAL, any_length=True)
    found = ranks.run(run_rings, stacked, (case, case), True, world_size=2)
    assert [seen.calls for seen in found] == [[[], []]] * 2


# ---- on graphs -----------------------------------------------------------------------


def marked_graph(finish: Callable[[Graph, Any], object]) -> GraphModule:
    """Two rings ``x -> hop -> wait -> finish``, equal but for their tags."""
    graph = Graph()
    xs = [graph.placeholder(f"x{n}") for n in range(2)]
    results: list[Any] = []
    for n, x in enumerate(xs):
        first = len(graph.nodes)
        tag = Tag(n, Phase.FORWARD_KV, 1).encode()
        hop = graph.call_function(ops.HOP, ([x], [], 1, 1, [4], tag, "0", 9.0))
        got = graph.call_function(torch.ops.aten.alias.default, (x,))
        item = graph.call_function(getitem, (hop, 0))
        results.append(finish(graph, (x, got, item)))
        for node in list(graph.nodes)[first:]:
            node.meta["custom"] = {"ringcompile.forward": n}
    graph.output(tuple(results))
    for node in graph.nodes:
        value = torch.empty(1, 1, 4, 8, device="meta")
        node.meta["val"] = [value] if node.target is ops.HOP else value
    return GraphModule({}, graph)


def count_calls(module: GraphModule) -> int:
    share_rings(module.graph)
    module.graph.lint()
    call: Any = torch.ops.higher_order.invoke_subgraph
    return len(module.graph.find_nodes(op="call_function", target=call))


def test_tags_are_those_of_one_of_several() -> None:
    aten = torch.ops.aten
    module = marked_graph(
        lambda g, nodes: g.call_function(aten.add.Tensor, (nodes[0], nodes[2]))
    )
    assert count_calls(module) == 2
    assert communicates(module)
    body = module.get_submodule("shared_ring_0")
    assert isinstance(body, GraphModule)
    (hop,) = body.graph.find_nodes(op="call_function", target=ops.HOP)
    tag = Tag.decode(hop.args[5])
    assert str(tag) == "one of several attentions, forward KV, step 1"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_results_in_memory_of_others_are_not_given(which: int) -> None:
    aten = torch.ops.aten

    def finish(graph: Graph, nodes: Any) -> object:  # noqa: ANN401
        total = graph.call_function(aten.add.Tensor, (nodes[0], nodes[2]))
        if which == 0:  # a view of an operand: it stays outside
            return (total, nodes[1])
        if which == 1:  # two views of one result
            return (total, graph.call_function(aten.alias.default, (total,)))
        return (total, graph.call_function(aten.cat.default, ([total, total], 2)))

    assert count_calls(marked_graph(finish)) == (2 if which == 0 else 0)


def test_a_ring_around_other_communication_stays() -> None:
    aten = torch.ops.aten
    module = marked_graph(
        lambda g, nodes: g.call_function(aten.add.Tensor, (nodes[0], nodes[2]))
    )
    first = next(n for n in module.graph.nodes if n.target is ops.HOP)
    with module.graph.inserting_after(first):
        other = module.graph.call_function(
            ops.ALL_GATHER, (first.args[0][0], 2, 0, "0", 9.0)
        )
    other.meta["val"] = torch.empty(2, 1, 1, 4, 8, device="meta")
    assert count_calls(module) == 0
