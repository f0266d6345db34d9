"""One rank's graph run forward and backward on fake tensors, without peers.

It fills ``node.meta["val"]`` with the shard's shapes and measures what the rank sends
in collectives and what autograd saves. Invariant: no data is computed, and grad mode is
left as it was.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from ringcompile.ops import ALL_GATHER, ALL_REDUCE, RING_ATTENTION
from ringcompile.torch_private import CallObserver, size_hint, storage_key


@dataclass(slots=True)
class Trial:
    """What a rank's graph needs, in bytes.

    Attributes:
        parameters: its inputs that are parameters.
        saved: what autograd saves beside inputs.
        attention: the part of it that ring attentions save.
        gathers: what the rank sends in all-gathers, forward and backward.
        reduces: the same in all-reduces.
    """

    parameters: int = 0
    saved: int = 0
    attention: int = 0
    gathers: int = 0
    reduces: int = 0


def run_trial(gm: GraphModule, world_size: int) -> Trial:
    """Run a rewritten graph on the fake values of its placeholders.

    Args:
        gm: the graph; the ``val`` of its nodes are set anew.
        world_size: the number of ranks it was written for.
    """
    trial = Trial()
    placeholders = gm.graph.find_nodes(op="placeholder")
    parameters = [n.meta["val"] for n in placeholders if n.meta.get("is_parameter")]
    trial.parameters = sum(map(bytes_of, parameters))
    with ExitStack() as modes:
        for mode in _fake_modes(placeholders):
            modes.enter_context(mode)
        modes.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        inputs = [_make_leaf(n) for n in placeholders]
        modes.enter_context(CallObserver(_Communication(trial, world_size)))
        outputs = _Shapes(gm, _Saved(trial, inputs)).run(*inputs)
        _run_backward(outputs)
    return trial


def bytes_of(x: Tensor) -> int:
    """Bytes of a tensor's elements, for the sizes of the call at hand."""
    return prod(map(size_hint, x.shape)) * x.element_size()


def _fake_modes(placeholders: Iterable[Node]) -> list[Any]:
    values = (n.meta.get("val") for n in placeholders)
    modes = (getattr(v, "fake_mode", None) for v in values)
    return [mode for mode in dict.fromkeys(modes) if mode is not None]


def _make_leaf(node: Node) -> object:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(bool(node.meta.get("requires_grad")))


def _run_backward(outputs: Any) -> None:  # noqa: ANN401 - what a graph returns
    found: list[object] = []
    map_aggregate(outputs, found.append)
    ends = [x for x in found if isinstance(x, Tensor) and x.requires_grad]
    if ends:
        torch.autograd.backward(ends, [torch.ones_like(x) for x in ends])


# ---- observers -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Communication:
    """Counts what a rank sends in collectives."""

    trial: Trial
    world_size: int

    def __call__(self, op: OpOverload, args: Sequence[Any], _result: object) -> None:
        others = self.world_size - 1
        if op is ALL_GATHER:
            self.trial.gathers += bytes_of(args[0]) * others
        elif op is ALL_REDUCE:
            whole = sum(map(bytes_of, args[0]))
            self.trial.reduces += 2 * whole * others // self.world_size


class _Saved:
    """Counts what autograd saves; what shares memory counts once, inputs do not."""

    def __init__(self, trial: Trial, inputs: Iterable[object]) -> None:
        self._trial = trial
        self._seen = {storage_key(x): x for x in inputs if isinstance(x, Tensor)}
        self.is_in_attention = False

    def pack(self, x: Tensor) -> Tensor:
        """Count ``x``, and hold it so that its key stays its own."""
        key = storage_key(x)
        if key not in self._seen:
            self._seen[key] = x
            size = bytes_of(x)
            self._trial.saved += size
            self._trial.attention += size if self.is_in_attention else 0
        return x


class _Shapes(Interpreter):
    """Runs a graph node by node and notes each value."""

    def __init__(self, gm: GraphModule, saved: _Saved) -> None:
        super().__init__(gm)
        self._saved = saved

    def run_node(self, n: Node) -> Any:  # noqa: ANN401 - any value
        self._saved.is_in_attention = n.target is RING_ATTENTION
        with saved_tensors_hooks(self._saved.pack, lambda x: x):
            value = super().run_node(n)
        n.meta["val"] = value
        return value
