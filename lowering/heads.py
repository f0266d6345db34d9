"""Parts of a ring's graph that are cut off it, to stand before the ring.

Invariant: a head has the placeholders that the ring's graph had, so that it is copied
for any ring that the graph is of.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ringcompile.torch_private import WAIT_TENSOR


@dataclass(frozen=True, slots=True)
class Head:
    """What was cut off.

    Attributes:
        graph: has the placeholders that the ring's graph had.
        results: nodes of it that the ring's graph reads.
    """

    graph: Graph
    results: tuple[Node, ...]

    def match(self, ring: Node) -> dict[Node, Node]:
        """A ring's operands by the placeholders that are theirs."""
        own = self.graph.find_nodes(op="placeholder")
        return dict(zip(own, find_operands(ring), strict=False))

    def write(
        self, ring: Node, before: Node, without: Container[Node] = ()
    ) -> dict[Node, Node]:
        """Copy it for a ring to in front of a node; gives the copies of its nodes."""
        copies = self.match(ring)
        with before.graph.inserting_before(before):
            for node in self.graph.nodes:
                if node.op != "placeholder" and node not in without:
                    assert node.op == "call_function", "a head reads no attribute"
                    copies[node] = before.graph.node_copy(node, copies.__getitem__)
                    copies[node].meta["stack_trace"] = ring.meta.get("stack_trace")
        return copies


def cut_off(body: GraphModule, results: Sequence[Node], name: str) -> Head:
    """Cut some nodes, and what they are made of, off a ring's graph.

    Args:
        body: it gets their values as placeholders behind its own.
        results: the nodes.
        name: of the placeholders, which are numbered.
    """
    head = Graph()
    copies: dict[Node, Node] = {}
    needed = find_ancestors(results)
    for node in body.graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = head.node_copy(node, copies.__getitem__)
    _read_instead(body.graph, results, name)
    body.recompile()
    return Head(head, tuple(copies[node] for node in results))


def _read_instead(graph: Graph, nodes: Sequence[Node], name: str) -> None:
    """Let placeholders stand for nodes, and for what those wait for."""
    behind = graph.find_nodes(op="placeholder")[-1].next
    for n, node in enumerate(nodes):
        with graph.inserting_before(behind):
            given = graph.placeholder(f"{name}_{n}")
        given.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(given)
        if node.target is WAIT_TENSOR:
            (flying,) = node.all_input_nodes
            graph.erase_node(node)
            flying.replace_all_uses_with(given)
    graph.eliminate_dead_code()


def find_ancestors(nodes: Sequence[Node]) -> set[Node]:
    """The nodes and all that they are computed from."""
    found: set[Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def find_operands(node: Node) -> list[Node]:
    """What a node reads, in order; what is read twice is named twice."""
    found: list[Node] = []
    map_arg((node.args, dict(node.kwargs)), found.append)
    return found
