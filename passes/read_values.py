"""Read nodes of a graph as functions of their indices, each node once.

What no rule can read, but is an integer or bool tensor that every rank can compute for
itself, is taken as a *capture*: a tensor known at run time, read at index expressions.
Invariant: a value read here is what the node holds for every input of the graph.
"""

from collections.abc import Iterable

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ringcompile.ir.mask import equals_zero, negate
from ringcompile.passes.memory import find_base, find_mutated, writes_memory
from ringcompile.passes.op import is_float, is_tensor, read_op
from ringcompile.passes.symbolic import (
    Content,
    Unreadable,
    Value,
    always,
    index_symbol,
    make_value,
)
from ringcompile.passes.value_elementwise import elementwise
from ringcompile.passes.value_rules import RULES
from ringcompile.passes.value_scalars import read_constant
from ringcompile.passes.value_views import VIEWS, Call

aten = torch.ops.aten

# Expressions are evaluated in the dtype of what they read: narrower ints would wrap.
_TESTS = {aten.eq, aten.ne, aten.gt, aten.ge, aten.lt, aten.le, aten.to, aten._to_copy}  # noqa: SLF001
_CAPTURED = (torch.bool, torch.int32, torch.int64)


class Reader:
    """Reads the nodes of one graph and remembers every answer.

    Args:
        graph: the graph.
        sources: nodes of any dtype that are read as unknown functions of their index.
    """

    def __init__(self, graph: Graph, sources: Iterable[Node] = ()) -> None:
        self._owner = graph.owning_module
        self._sources = frozenset(sources)
        self._known: dict[Node, Value | Unreadable] = {}
        self._mutated = find_mutated(graph)
        self._nodes: list[Node] = list(graph.nodes)
        self._order = {node: place for place, node in enumerate(self._nodes)}
        self._computed_alike: dict[object, Node] = {}
        self._twin: dict[Node, Node] = {}
        self._replicated: dict[Node, bool] = {}

    def read(self, node: Node) -> Value:
        """The value of a tensor node.

        Raises:
            Unreadable: nothing is known of it.
        """
        if node not in self._known:
            try:
                self._known[node] = self._read(node)
            except Unreadable as error:
                self._known[node] = error
        known = self._known[node]
        if isinstance(known, Unreadable):
            raise Unreadable(known.because)
        return known

    def node_of(self, capture: AppliedUndef) -> Node:
        """The node that a capture reads."""
        place = int(capture.func.__name__.removeprefix("node"))
        return self._nodes[place]

    def place_of(self, node: Node) -> int:
        """Where the node stands in the graph."""
        return self._order[node]

    def fix_symbols(self, symbols: Iterable[sympy.Symbol]) -> dict[sympy.Symbol, int]:
        """Fix inputs of the graph that are sizes to their value at hand, guarded."""
        inputs = {
            node.meta["val"].node.expr: node.meta["val"]
            for node in self._order
            if node.op == "placeholder" and isinstance(node.meta["val"], torch.SymInt)
        }
        unknown = [s for s in symbols if s not in inputs]
        if unknown:
            raise Unreadable(f"the size {unknown[0]} isn't an input")
        return {s: int(inputs[s]) for s in symbols}

    def _read(self, node: Node) -> Value:
        if node in self._sources:
            return self._capture(node)
        try:
            return self._apply_rule(node)
        except Unreadable:
            if not self._can_capture(node):
                raise
        return self._capture(self._find_twin(node))

    def _apply_rule(self, node: Node) -> Value:
        value = node.meta.get("val")
        assert isinstance(value, Tensor), f"{node} is not a tensor"
        if self.is_mutated(node):
            raise Unreadable(f"{node.name} is changed in place")
        if node.op == "get_attr":
            return self._read_constant(node)
        op = read_op(node)
        if op is None:
            raise Unreadable(f"{node.name} isn't computed from positions")
        rule = RULES.get(op.packet)
        if rule is None and _is_elementwise(node):
            rule = elementwise
        if rule is None:
            raise Unreadable(f"{node.name}: what {node.target} makes isn't read")
        return make_value(
            value.shape, value.dtype, rule(Call(op, self.read, self.is_mutated))
        )

    def _read_constant(self, node: Node) -> Value:
        constant = getattr(self._owner, str(node.target), None)
        if not isinstance(constant, Tensor) or constant.numel() != 1:
            raise Unreadable(f"{node.name} is a tensor of many numbers")
        return make_value(constant.shape, constant.dtype, read_constant(constant))

    def _capture(self, node: Node) -> Value:
        value = node.meta["val"]
        index = [index_symbol(d) for d in range(value.ndim)]
        read = sympy.Function(f"node{self._order[node]}", integer=True)(*index)
        content: Content = always(read)
        if value.dtype is torch.bool:
            content = negate(equals_zero(read))
        return make_value(value.shape, value.dtype, content)

    # ---- what may be captured --------------------------------------------------------

    def _can_capture(self, node: Node) -> bool:
        dtype = node.meta["val"].dtype
        if dtype is torch.bool and self.tests_input(node):
            return True
        return dtype in _CAPTURED and self._is_replicated(node)

    def tests_input(self, node: Node) -> bool:
        """Whether it compares floats that are passed in with a number, one by one."""
        op = read_op(node)
        if op is None or len(op.slots) != 1 or op.packet not in _TESTS:
            return False
        source = op.slots[0]
        while (above := read_op(source)) is not None and above.packet in VIEWS:
            source = above.slots[0]
        is_given = source.op in ("placeholder", "get_attr") and is_float(source)
        is_learned = source.meta.get("is_parameter", False)
        return is_given and not is_learned and not self.is_mutated(source)

    def _is_replicated(self, node: Node) -> bool:
        """Whether it follows from integers and bools only, the same on every rank."""
        if node not in self._replicated:
            self._replicated[node] = self._follows_from_integers(node)
        return self._replicated[node]

    def _follows_from_integers(self, node: Node) -> bool:
        if node.op in ("placeholder", "get_attr"):
            return not (is_tensor(node) and is_float(node))
        if node.op != "call_function" or self.is_mutated(node) or _is_random(node):
            return False
        if not isinstance(node.target, OpOverload) and not _is_python(node):
            return False
        return all(self._is_replicated(n) for n in node.all_input_nodes)

    def is_mutated(self, node: Node) -> bool:
        """Whether the node writes, or some op of the graph writes to its storage."""
        return writes_memory(node) or find_base(node) in self._mutated

    def _find_twin(self, node: Node) -> Node:
        """The first node that is computed in the same way."""
        if node.op != "call_function":
            return node
        if node not in self._twin:
            arguments = map_arg((node.args, node.kwargs), self._find_twin)
            key = (node.target, repr(arguments))
            self._twin[node] = self._computed_alike.setdefault(key, node)
        return self._twin[node]


def _is_elementwise(node: Node) -> bool:
    target = node.target
    return (
        isinstance(target, OpOverload)
        and torch.Tag.pointwise in target.tags
        and not _is_random(node)
    )


def _is_python(node: Node) -> bool:
    """Whether the node is a function of Python on numbers or tuples."""
    return getattr(node.target, "__module__", "") in ("_operator", "math", "torch")


def _is_random(node: Node) -> bool:
    target = node.target
    return (
        isinstance(target, OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
    )
