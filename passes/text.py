"""A graph as short, stable ASCII text that a person reads like a program."""

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument, map_aggregate


def format_graph(gm: GraphModule, *, name: str) -> str:
    """Write a graph as a Python-like program.

    Args:
        gm: the graph.
        name: the pass that made it, named in the first line.

    Returns:
        One line a node: ``name: dtype[shape] = op(arguments)``.
    """
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    lines = [f"# after {name}", f"def forward({', '.join(n.name for n in inputs)}):"]
    lines += [f"    {_format_node(n)}" for n in gm.graph.nodes if n.op != "placeholder"]
    return "\n".join(lines) + "\n"


def _format_node(node: Node) -> str:
    if node.op == "output":
        return f"return {_format_argument(node.args[0])}"
    kind = _format_type(node.meta.get("val"))
    left = f"{node.name}: {kind}" if kind else node.name
    if node.op == "get_attr":
        return f"{left} = self.{node.target}"
    args = [_format_argument(a) for a in node.args]
    args += [f"{k}={_format_argument(v)}" for k, v in node.kwargs.items()]
    return f"{left} = {format_target(node.target)}({', '.join(args)})"


def format_target(target: object) -> str:
    """The name of what a node calls, the same in every process."""
    if isinstance(target, OpOverload):
        overload = target._overloadname  # noqa: SLF001
        packet = str(target.overloadpacket)
        return packet if overload == "default" else f"{packet}.{overload}"
    return str(getattr(target, "__name__", target))


def format_calls(graph: Graph) -> str:
    """Every call of a graph, the same text on all ranks: each has a device of its own.

    Args:
        graph: one that ranks compare.
    """

    def general(argument: Argument) -> Argument:
        return argument.type if isinstance(argument, torch.device) else argument

    return "\n".join(
        f"{node.name} {format_target(node.target)}"
        f" {map_aggregate(node.args, general)} {map_aggregate(node.kwargs, general)}"
        for node in graph.nodes
    )


def _format_type(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    return "" if value is None else type(value).__name__


def _format_argument(value: Argument) -> str:
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_format_argument(v) for v in value)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else repr(value[:57] + "...")  # noqa: PLR2004
    return repr(value)
