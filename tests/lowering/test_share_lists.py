"""Lists of blocks are made once for all layers of a graph."""

from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from support.compiling import compile_expanded
from support.ranks import RankPool
from support.ring_cases import Case, plan_text
from support.sampling import slow
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.fx import Graph, GraphModule

from ringcompile import ops
from ringcompile.ir.text import rename_plan
from ringcompile.lowering.share_lists import split_lists

LAYERS = 3


def run_layers(
    group: ProcessGroup, rank: int, case: Case, num_masks: int, compiles: bool
) -> tuple[list[Tensor], list[int]]:
    """Out and gradients, and how often each graph lists the blocks of a mask."""
    text = plan_text(case, group, rank, timeout_s=60.0)
    plans = [rename_plan(text, n, f"layers.{n}") for n in range(LAYERS)]
    counts: list[int] = []

    def model(x: Tensor, k: Tensor, v: Tensor, *captures: Tensor) -> Tensor:
        size = len(captures) // num_masks
        for n, plan in enumerate(plans):
            first = n % num_masks * size
            own = list(captures[first : first + size])
            x = x + ops.RING_ATTENTION(x.sin(), k, v * (n + 1), own, [], plan=plan)
        return x

    def see(gm: GraphModule, _is_backward: bool) -> None:
        found = gm.graph.find_nodes(op="call_function", target=ops.LIST_BLOCKS)
        counts.append(len(found))

    def backend(gm: GraphModule, example: list[Tensor]) -> Callable[..., object]:
        return compile_expanded(gm, example, see)

    *inputs, grad = case.shard(group.size(), rank)
    captures = [x.roll(n) for n in range(num_masks) for x in case.captures]
    torch.compiler.reset()
    call: Any = model
    if compiles:
        call = torch.compile(model, backend=backend, fullgraph=True)
    out = call(*inputs, *captures)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)], counts


@pytest.mark.parametrize(
    ("num_masks", "any_length"), [slow(1, False), (2, False), slow(1, True)]
)
def test_layers_share_the_lists_of_a_mask(
    ranks: RankPool, num_masks: int, any_length: bool
) -> None:
    case = Case("documents", "zigzag", 64, kernel="flex", any_length=any_length)
    got = ranks.run(run_layers, case, num_masks, True, world_size=2)
    want = ranks.run(run_layers, case, num_masks, False, world_size=2)
    alone = ranks.run(run_layers, case, LAYERS, True, world_size=2)
    for (found, counts), (wanted, _), (_, most) in zip(got, want, alone, strict=True):
        for x, y in zip(found, wanted, strict=True):
            assert torch.equal(x, y)
        assert len(counts) == 2
        assert min(counts) > 0
        assert [n * LAYERS for n in counts] == [n * num_masks for n in most]


def _body(*, reads_q: bool) -> GraphModule:
    graph = Graph()
    q, ids = graph.placeholder("q"), graph.placeholder("ids")
    q.meta["val"], ids.meta["val"] = torch.ones(4), torch.ones(4, dtype=torch.int64)
    aten = torch.ops.aten
    at = graph.call_function(aten.arange.default, (4,))
    must = graph.call_function(aten.eq.Tensor, (ids, q if reads_q else at))
    lists = graph.call_function(ops.LIST_BLOCKS, (must, must))
    for n in range(8):
        item = graph.call_function(getitem, (lists, n))
        item.meta["val"] = torch.ones(4, dtype=torch.int32)
        q = graph.call_function(aten.add.Tensor, (q, item))
    graph.output((q,))
    return GraphModule({}, graph)


def test_what_makes_lists_is_cut_off() -> None:
    body = _body(reads_q=False)
    head = split_lists(body)
    assert head is not None
    names = [str(n.target).split(".")[0] for n in head.graph.nodes]
    assert names[2:5] == ["aten", "aten", "ringcompile"]
    assert len(head.results) == 8
    assert {n.target for n in body.graph.nodes if n.op == "call_function"} == {
        torch.ops.aten.add.Tensor
    }
    given = [n.name for n in body.graph.find_nodes(op="placeholder")]
    assert given == ["q", "ids", *(f"list_{n}" for n in range(8))]
    body.graph.lint()
    assert split_lists(body) is None


def test_lists_of_numbers_stay() -> None:
    body = _body(reads_q=True)
    before = str(body.graph)
    assert split_lists(body) is None
    assert str(body.graph) == before
