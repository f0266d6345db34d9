"""Rings are written out, those that are alike are compiled once, and no bit changes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.ranks import RankPool
from support.ring_cases import Case, plan_text
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ringcompile import ops
from ringcompile.inductor_passes import call_graph
from ringcompile.ir.text import rename_plan
from ringcompile.lowering import inductor
from ringcompile.lowering.expand import communicates, expand_rings
from ringcompile.lowering.hops import Tag
from ringcompile.torch_private import WAIT_TENSOR, compile_with_inductor

CAUSAL = Case("causal", "zigzag")
_CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_FLASH_BACKWARD = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
)
PLACED = {
    ops.HOP: "start",
    WAIT_TENSOR: "wait",
    _CPU_FLASH.default: "tile",
    _CPU_FLASH_BACKWARD.default: "tile",
}


@dataclass(slots=True)
class Seen:
    """Of the graphs that Inductor lowered, forward first.

    Attributes:
        ops_before: ring ops that were written out.
        calls: names of called graphs.
        hops: tags of the hops outside of those.
        inside: tags of the hops of each called graph.
        orders: what graphs start, wait for and call.
        sequences: the same, starts by their tags.
        chained: calls, and how many of them wait for the communication before them.
        laid: starts, waits and tiles as they stand in the graph.
        scheduled: the same as Inductor runs them.
        results: out and gradients.
    """

    ops_before: list[int] = field(default_factory=list)
    calls: list[list[str]] = field(default_factory=list)
    hops: list[list[str]] = field(default_factory=list)
    inside: list[list[str]] = field(default_factory=list)
    orders: list[list[str]] = field(default_factory=list)
    sequences: list[list[str]] = field(default_factory=list)
    chained: list[tuple[int, int]] = field(default_factory=list)
    laid: list[list[str]] = field(default_factory=list)
    scheduled: list[list[str]] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)

    def expand(self, graph: Graph, **how: bool) -> None:
        before = len(find(graph, ops.RING_FORWARD) + find(graph, ops.RING_BACKWARD))
        expand_rings(graph, **how)
        graph.lint()
        if before == 0:  # a called graph, which Inductor's passes go over as well
            self.inside.append(read_tags(graph))
            calls = [repr((n.target, n.args, n.kwargs)) for n in graph.nodes]
            assert len(set(calls)) == len(calls), "something is computed twice"
            return
        self.ops_before.append(before)
        self.laid.append([PLACED[n.target] for n in graph.nodes if n.target in PLACED])
        self.calls.append([str(n.args[1]) for n in find(graph, call_graph)])
        self.hops.append(read_tags(graph))
        names = {ops.HOP: "start", WAIT_TENSOR: "wait", call_graph: "ring"}
        order = [names[n.target] for n in graph.nodes if n.target in names]
        self.orders.append([name for name, _ in groupby(order)])
        self.sequences.append(
            [
                str(Tag.decode(n.args[5])) if n.target is ops.HOP else "ring"
                for n in graph.nodes
                if n.target in {ops.HOP, call_graph}
            ]
        )

    def see_schedule(self, nodes: list[Any]) -> list[Any]:
        calls = [n for n in nodes if type(n.node).__name__ == "InvokeSubgraph"]
        for call in calls:
            operands = call.node.subgraph.graph.graph_inputs_original.values()
            kinds = {type(x).__name__ for x in operands}
            assert "DonatedBuffer" not in kinds, "an operand may be written to"
        weak = [
            any(getattr(dep, "is_fake", False) for dep in n.unmet_dependencies)
            for n in calls
        ]
        if calls:
            self.chained.append((len(calls), sum(weak)))
        return nodes

    def see_fused(self, nodes: list[Any]) -> list[Any]:
        ops_of = [getattr(n.node, "op_overload", None) for n in nodes]
        self.scheduled.append([PLACED[op] for op in ops_of if op in PLACED])
        return nodes


def find(graph: Graph, op: Any) -> list[Any]:  # noqa: ANN401
    return list(graph.find_nodes(op="call_function", target=op))


def read_tags(graph: Graph) -> list[str]:
    return [str(Tag.decode(n.args[5])) for n in find(graph, ops.HOP)]


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


def with_one_kv(plans: list[str]) -> Model:
    """Rings that read the same K and V."""

    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for plan in plans:
            x = x + ops.RING_ATTENTION(x.sin(), k, v, [], [], plan=plan)
        return x

    return model


def of_one_tensor(plans: list[str]) -> Model:
    """Queries, keys and values are one tensor."""

    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for plan in plans:
            x = x + ops.RING_ATTENTION(x, x, x, [], [], plan=plan)
        return x + (k + v).sum()

    return model


def feeding_both(plans: list[str]) -> Model:
    """What goes into the first ring could be fused with what is made of the second's."""

    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = plans
        weight = torch.eye(x.shape[-1])
        a = ops.RING_ATTENTION(x.sin(), k, v, [], [], plan=first)
        b = ops.RING_ATTENTION(k.repeat_interleave(2, 1), k, v, [], [], plan=second)
        total: Tensor = (x + b) @ weight + a @ weight
        return total

    return model


def normed(plans: list[str]) -> Model:
    """Weights scale what goes into rings, and what comes out of them."""

    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before, behind = k[0, 0, 0], v[0, 0, 0]
        for plan in plans:
            out = ops.RING_ATTENTION(x * before, k, v, [], [], plan=plan)
            x = (x + out) * behind
        return x

    return model


def checkpointed(plans: list[str]) -> Model:
    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for plan in plans:
            x = x + checkpoint(stacked([plan]), x, k, v, use_reentrant=False)
        return x

    return model


def recomputed(plans: list[str]) -> Model:
    """Rings whose K and V are made anew in backward, each before its ring."""

    def attend(x: Tensor, k: Tensor, v: Tensor, plan: str) -> Tensor:
        weight = torch.eye(k.shape[-1])
        k, v = (((x[:, :2] + y) @ weight).sin() for y in (k, v))
        out: Tensor = ops.RING_ATTENTION(x, k, v, [], [], plan=plan)
        return x + out

    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for plan in plans:
            x = checkpoint(attend, x, k, v, plan, use_reentrant=False)
        return x

    return model


def run_rings(
    group: ProcessGroup,
    rank: int,
    build: Callable[[list[str]], Model],
    cases: tuple[Case, ...],
    patches: dict[str, Any],
) -> Seen:
    """Compile by Inductor, under the user's ``patches``, and run."""
    seen, (first, *_) = Seen(), cases
    plans = [
        rename_plan(plan_text(c, group, rank, timeout_s=60.0), n, f"layers.{n}")
        for n, c in enumerate(cases)
    ]

    def backend(gm: GraphModule, example: list[Tensor]) -> Callable[..., object]:
        with patch.object(inductor, "expand_rings", seen.expand):
            ours = inductor.inductor_patches(patches)
        order: Any = ours["_pre_fusion_custom_pass"]
        ours["_pre_fusion_custom_pass"] = lambda nodes: seen.see_schedule(order(nodes))
        ours["_post_fusion_custom_pass"] = seen.see_fused
        return compile_with_inductor(gm, example, ours)

    *inputs, grad = first.shard(group.size(), rank)
    torch.compiler.reset()
    out = torch.compile(build(plans), backend=backend, fullgraph=True)(*inputs)
    out.backward(grad)
    grads = [x.grad for x in inputs if x.grad is not None]
    seen.results = [out.detach(), *grads]
    return seen


CALLED: dict[str, Any] = {}
WRITTEN_OUT = {"cpp_wrapper": True}


def run_eagerly(
    group: ProcessGroup,
    rank: int,
    build: Callable[[list[str]], Model],
    cases: tuple[Case, ...],
) -> list[Tensor]:
    """The same, not compiled."""
    with patch.object(torch, "compile", lambda model, **_: model):
        return run_rings(group, rank, build, cases, {}).results


def check(
    ranks: RankPool, build: Callable[[list[str]], Model], *cases: Case
) -> list[Seen]:
    """What was seen of calls; results are those of the ops run eagerly."""
    seen = ranks.run(run_rings, build, cases, CALLED, world_size=2)
    eager = ranks.run(run_eagerly, build, cases, world_size=2)
    for found, wanted in zip(seen, eager, strict=True):
        assert len(found.results) == 4
        for got, want in zip(found.results, wanted, strict=True):
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    return seen


SHARED = "one of several attentions, "


def test_rings_that_are_alike_are_one(ranks: RankPool) -> None:
    for seen in check(ranks, stacked, CAUSAL, CAUSAL):
        assert seen.ops_before == [2, 2]
        assert seen.calls == [["shared_ring_0"] * 2] * 2
        assert seen.hops == [[], [SHARED + "backward KV, step 1"] * 2]
        assert seen.inside == [
            [SHARED + "forward KV, step 1"],
            [SHARED + "backward dKV, step 1"],
        ]


@pytest.mark.slow
def test_rings_that_are_alike_are_one_beside_another(ranks: RankPool) -> None:
    window = replace(CAUSAL, mask="window")
    for seen in check(ranks, stacked, CAUSAL, window, CAUSAL):
        assert seen.ops_before == [3, 3]
        assert seen.calls == [["shared_ring_0"] * 2] * 2
        assert seen.hops == [  # of the one that is like no other, and first fetches
            ["attention 1, forward KV, step 1"],
            [
                SHARED + "backward KV, step 1",
                "attention 1, backward KV, step 1",
                SHARED + "backward KV, step 1",
                "attention 1, backward dKV, step 1",
            ],
        ]
        assert seen.inside == [
            [SHARED + "forward KV, step 1"],
            [SHARED + "backward dKV, step 1"],
        ]


@pytest.mark.slow
def test_different_rings_are_not(ranks: RankPool) -> None:
    window = replace(CAUSAL, mask="window")
    for seen in check(ranks, stacked, CAUSAL, window, CAUSAL, window):
        for calls in seen.calls:
            assert sorted(calls) == ["shared_ring_0"] * 2 + ["shared_ring_1"] * 2


def test_a_single_ring_is_written_out(ranks: RankPool) -> None:
    for seen in check(ranks, stacked, CAUSAL):
        assert seen.calls == [[], []]
        assert seen.hops == [
            ["attention 0, forward KV, step 1"],
            ["attention 0, backward KV, step 1", "attention 0, backward dKV, step 1"],
        ]


def test_fusion_takes_no_kernel_from_where_a_hop_flies_under_it(
    ranks: RankPool,
) -> None:
    """A sum of the ring's gradients could be fused with one that comes before it."""
    for seen in check(ranks, normed, CAUSAL):
        assert seen.scheduled == seen.laid
        forward, backward = ([name for name, _ in groupby(x)] for x in seen.laid)
        assert forward == ["start", "tile", "wait", "tile"]
        assert backward == ["start", "wait", "tile", "start", "tile", "wait"]


@pytest.mark.parametrize(
    "build", [with_one_kv, pytest.param(of_one_tensor, marks=pytest.mark.slow)]
)
def test_operands_that_are_one_tensor(
    ranks: RankPool, build: Callable[[list[str]], Model]
) -> None:
    for seen in check(ranks, build, CAUSAL, CAUSAL):
        assert [len(calls) for calls in seen.calls] == [2, 2]
        forward, backward = seen.orders
        assert forward == ["ring"]  # two, one behind the other
        if build is with_one_kv:  # backward fetches ahead
            assert backward == ["start", "wait", "start", "ring", "wait", "ring"]


@pytest.mark.slow
def test_other_kernels_and_tables(ranks: RankPool) -> None:
    math = replace(CAUSAL, heads=(4, 2, 8, 16), mask="all")
    for seen in check(ranks, side_by_side, math, math):
        assert [len(calls) for calls in seen.calls] == [2, 2]
    dilated = Case("longnet", "contiguous")
    for seen in check(ranks, stacked, dilated, dilated):
        assert [len(calls) for calls in seen.calls] == [2, 2]


def test_independent_rings_stay_in_order(ranks: RankPool) -> None:
    for seen in check(ranks, side_by_side, CAUSAL, CAUSAL, CAUSAL):
        assert [len(calls) for calls in seen.calls] == [3, 3]
        assert seen.chained == [(3, 2), (3, 3)]


@pytest.mark.slow
def test_keys_made_anew_are_fetched_as_soon_as_they_are(ranks: RankPool) -> None:
    for seen in check(ranks, recomputed, CAUSAL, CAUSAL):
        _, backward = seen.orders
        assert backward == ["start", "wait", "ring"] * 2


def test_fusion_makes_no_circle_of_rings_and_what_they_read(ranks: RankPool) -> None:
    for seen in check(ranks, feeding_both, CAUSAL, CAUSAL):
        assert sum(len(calls) for calls in seen.calls) > 0


def test_checkpointed_rings(ranks: RankPool) -> None:
    for seen in check(ranks, checkpointed, CAUSAL, CAUSAL):
        assert seen.ops_before == [2, 2]  # none runs again
        assert [len(calls) for calls in seen.calls] == [2, 2]


@pytest.mark.slow
def test_where_inductor_calls_no_graph_each_is_written_out(ranks: RankPool) -> None:
    """Tags and their order are the same: what ranks expect hangs on no setting."""
    cases = (CAUSAL, CAUSAL)
    called = ranks.run(run_rings, stacked, cases, CALLED, world_size=2)
    written = ranks.run(run_rings, stacked, cases, WRITTEN_OUT, world_size=2)
    for one, other in zip(called, written, strict=True):
        assert other.calls == [[], []]
        for n, sequence in enumerate(one.sequences):
            inside = {"ring": one.inside[n]}
            called_tags = [tag for x in sequence for tag in inside.get(x, [x])]
            assert other.sequences[n] == called_tags
        assert all(map(torch.equal, one.results, other.results))


@pytest.mark.parametrize("may_be_cut", [False, True])
def test_a_ring_may_read_what_the_ring_before_gives(*, may_be_cut: bool) -> None:
    """With nothing in between: the first is gone when the second is written out."""
    group: Any = SimpleNamespace(size=lambda: 2, group_name="0")
    plan = plan_text(CAUSAL, group, 1, timeout_s=60.0)
    rows = CAUSAL.length // 2

    def run(x: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Forward twice, then backward of both, each of what the last one gave."""
        out, lse, *_ = ops.RING_FORWARD(x, k, v, [], [], None, plan=plan)
        again, lse_again, *_ = ops.RING_FORWARD(out, k, v, [], [], None, plan=plan)
        needed: Any = {"needed": [True, True, True, False], "num_blocks": None}
        saved: Any = (out, k, v, [again], lse_again, [], [], None)
        grad, *_ = ops.RING_BACKWARD(again, *saved, **needed, plan=plan)
        saved = (x, k, v, [out], lse, [], [], None)
        found: list[Tensor] = ops.RING_BACKWARD(grad, *saved, **needed, plan=plan)
        return found

    with FakeTensorMode():
        inputs = [torch.empty(2, n, rows, 8) for n in (4, 2, 2)]
        graph = make_fx(run)(*inputs)
    expand_rings(graph.graph, can_call=False, may_be_cut=may_be_cut)
    graph.graph.lint()
    assert not find(graph.graph, ops.RING_FORWARD) + find(
        graph.graph, ops.RING_BACKWARD
    )
    tags = read_tags(graph.graph)
    phases = [tag.partition(", ")[2].partition(",")[0] for tag in tags]
    forward, fetch, give = "forward KV", "backward KV", "backward dKV"
    if may_be_cut:  # in a CUDA graph, which waits for what it starts
        assert phases == [forward, forward, fetch, give, fetch, give]
    else:  # K and V are there from the start
        assert phases == [fetch, forward, forward, fetch, give, give]


@pytest.mark.parametrize(
    ("mask", "layout"),
    [("causal", "zigzag"), ("documents", "zigzag"), ("longnet", "contiguous")],
)
def test_rings_read_nothing_of_the_host(mask: str, layout: str) -> None:
    """Inductor would cut a CUDA graph there, with a hop under way."""
    group: Any = SimpleNamespace(size=lambda: 2, group_name="0")
    case = Case(mask, layout)
    plan, rows = plan_text(case, group, 1, timeout_s=60.0), case.length // 2
    heads, kv_heads, size, value_size = case.heads

    def run(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> list[Tensor]:
        captures = [ids, ids] if mask == "documents" else []
        out, lse, *_ = ops.RING_FORWARD(q, k, v, captures, [], None, plan=plan)
        needed: Any = {"needed": [True, True, True, False], "num_blocks": None}
        saved: Any = (q, k, v, [out], lse, captures, [], None)
        found: list[Tensor] = ops.RING_BACKWARD(out, *saved, **needed, plan=plan)
        return found

    with FakeTensorMode():
        shapes = ((heads, size), (kv_heads, size), (kv_heads, value_size))
        inputs = [torch.empty(2, n, rows, d, device="meta") for n, d in shapes]
        ids = torch.zeros(2, case.length, dtype=torch.int64, device="meta")
        graph = make_fx(run)(*inputs, ids)
    expand_rings(graph.graph, can_call=False)
    values = tree_leaves([node.meta.get("val") for node in graph.graph.nodes])
    assert {x.device.type for x in values if isinstance(x, Tensor)} == {"meta"}


@pytest.mark.slow
def test_any_length_is_written_out(ranks: RankPool) -> None:
    case = replace(CAUSAL, any_length=True)
    for seen in check(ranks, stacked, case, case):
        assert seen.calls == [[], []]
        assert [len(tags) for tags in seen.hops] == [2, 4]


def test_a_called_graph_communicates() -> None:
    body = Graph()
    x = body.placeholder("x")
    body.output(body.call_function(ops.HOP, ([x], [], 1, 1, [4], 0, "0", 9.0)))
    outer = Graph()
    child = outer.get_attr("body")
    outer.output(
        outer.call_function(call_graph, (child, "body", outer.placeholder("x")))
    )
    assert communicates(GraphModule({"body": GraphModule({}, body)}, outer))
    assert not communicates(GraphModule({}, Graph()))
