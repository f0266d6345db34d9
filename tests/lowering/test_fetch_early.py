"""What a ring's backward fetches first, cut off its graph and written ahead of it."""

from operator import getitem

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from ringcompile import ops
from ringcompile.lowering.fetch_early import fetch_early, split_first_fetch
from ringcompile.lowering.heads import Head, find_operands
from ringcompile.torch_private import WAIT_TENSOR

ADD, SIN = torch.ops.aten.add.Tensor, torch.ops.aten.sin.default


def _hop(graph: Graph, x: Node, tag: int, deps: tuple[Node, ...] = ()) -> Node:
    """What a hop of ``x`` brings, not waited for."""
    args = ([x], list(deps), 1, 1, [4], tag, "0", 9.0)
    hop = graph.call_function(ops.HOP, args)
    hop.meta["val"] = [torch.ones(1)]
    flying = graph.call_function(getitem, (hop, 0))
    flying.meta["val"] = torch.ones(1)
    return flying


def _wait(graph: Graph, flying: Node) -> Node:
    landed = graph.call_function(WAIT_TENSOR, (flying,))
    landed.meta["val"] = torch.ones(1)
    return landed


def _body(first_stage: int = 1, stages: int = 2) -> GraphModule:
    """Of q and k: stages of hops, each computed with while the next one's fly."""
    graph = Graph()
    q, k = graph.placeholder("q"), graph.placeholder("k")
    sent = graph.call_function(SIN, (k,))
    flying: list[Node] = []
    tag, deps = 0, tuple[Node, ...]()
    for _ in range(first_stage):
        flying.append(_hop(graph, sent, tag, deps))
        tag, deps = tag + 1, (flying[-1],)
    total = q
    for _ in range(stages):
        landed = [_wait(graph, x) for x in flying]
        flying = [_hop(graph, sent, tag, deps)]
        tag, deps = tag + 1, (flying[-1],)
        for x in landed:
            total = graph.call_function(ADD, (total, x))
    graph.output((graph.call_function(ADD, (total, _wait(graph, flying[0]))),))
    return GraphModule({}, graph)


def _tags(graph: Graph) -> list[object]:
    return [n.args[5] for n in graph.find_nodes(op="call_function", target=ops.HOP)]


def test_the_first_stage_is_cut_off_and_no_other() -> None:
    for count in (1, 3):
        body = _body(first_stage=count)
        head = split_first_fetch(body)
        assert head is not None
        assert _tags(head.graph) == list(range(count))
        assert len(head.results) == count
        assert _tags(body.graph) == [count, count + 1]
        names = [n.name for n in body.graph.find_nodes(op="placeholder")]
        assert names == ["q", "k", *(f"fetched_{n}" for n in range(count))]
        body.graph.lint()
        head.graph.lint()
        assert len({n.target for n in body.graph.find_nodes(op="placeholder")}) == (
            2 + count
        )


def test_a_ring_that_fetches_nothing_stays() -> None:
    graph = Graph()
    q, k = graph.placeholder("q"), graph.placeholder("k")
    graph.output((graph.call_function(ADD, (q, k)),))
    body = GraphModule({}, graph)
    before = str(body.graph)
    assert split_first_fetch(body) is None
    assert str(body.graph) == before


def _write(*, is_made_late: bool) -> list[str]:
    """Two rings and their heads in a graph: its nodes in order."""
    graph = Graph()
    q, k, other = (graph.placeholder(name) for name in ("q", "k", "other"))
    loss = graph.call_function(SIN, (q,))  # what comes before all rings
    plan: dict[str, Argument] = {"plan": "any"}
    first = graph.call_function(ops.RING_BACKWARD, (loss, k), plan)
    late = graph.call_function(SIN, (other,)) if is_made_late else other
    second = graph.call_function(ops.RING_BACKWARD, (first, late), plan)
    graph.output(second)
    heads: dict[Node, Head] = {}
    for ring in (first, second):
        head = split_first_fetch(_body())
        assert head is not None
        heads[ring] = head
    fetched = fetch_early(graph, heads)
    graph.lint()
    for ring, found in fetched.items():
        (wait,) = found
        assert wait.target is WAIT_TENSOR
        sent = wait.all_input_nodes[0].all_input_nodes[0].all_input_nodes[0]
        assert sent.all_input_nodes == [find_operands(ring)[1]]
    names = {
        ops.HOP: "start",
        WAIT_TENSOR: "wait",
        ops.RING_BACKWARD: "ring",
        SIN: "sin",
    }
    return [names[n.target] for n in graph.nodes if n.target in names]


def test_a_fetch_starts_before_the_ring_before_it() -> None:
    """And behind the waits of that one, so that no two of one tag are under way."""
    sent = ["sin", "start"]
    want = [*sent, "sin", "wait", *sent, "ring", "wait", "ring"]
    assert _write(is_made_late=False) == want


def test_of_what_is_made_behind_the_ring_before_it_starts_at_once() -> None:
    sent = ["sin", "start"]
    want = [*sent, "sin", "wait", "ring", "sin", *sent, "wait", "ring"]
    assert _write(is_made_late=True) == want
