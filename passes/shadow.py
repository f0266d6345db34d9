"""A Dynamo graph to one flat ATen graph, traced before dispatch.

The passes read *and* rewrite this graph. Composite ops stay whole (``aten.linear``,
``aten.softmax``, ``aten.scaled_dot_product_attention``), every spelling of Python is
gone, and bodies of checkpoint, wrap and nested-region calls are inlined. Invariant: run
on the same inputs it computes what the Dynamo graph does; nodes of a checkpointed body
carry the tags by which AOTAutograd's partitioner recomputes them, and nodes of a body
that several modules share carry the names of the module that calls it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from ringcompile.passes.block_checks import BlockCheck
from ringcompile.passes.block_masks import FLEX, Scope, find_list_only
from ringcompile.passes.composites import WRITTEN_OUT
from ringcompile.passes.inline_flex import inline_flex
from ringcompile.passes.places import Move, innermost_module, move_modules
from ringcompile.passes.sharded_inputs import LOCAL, Lengths
from ringcompile.torch_private import (
    AUTOCAST_CALLS,
    AUTOGRAD_GRAD,
    ENTER_AUTOCAST,
    fake_inputs,
    is_fake,
)

# Higher-order op -> how many leading arguments are not operands of its body.
_INLINED = {
    "tag_activation_checkpoint": 1,
    "wrap": 1,
    "invoke_subgraph": 2,
}
# Options of ``checkpoint`` itself, which AOTAutograd does not need: it always replays
# random numbers and never re-enters autograd.
_CHECKPOINT_OPTIONS = frozenset(
    {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
)


def trace_shadow(
    gm: GraphModule, example_inputs: Sequence[object], lengths: Lengths | None = None
) -> GraphModule:
    """Trace ``gm`` into the graph that all passes work on.

    Args:
        gm: a Dynamo graph.
        example_inputs: its inputs, real or fake, in placeholder order.
        lengths: the lengths that are a rank's own: the graph is of whole ones.

    Returns:
        A flat graph with fake values in ``node.meta["val"]``, placeholders under their
        old names, ``meta["is_parameter"]`` and ``meta["requires_grad"]`` on them, and
        ``meta[LOCAL]`` on those whose ``val`` is P times what the rank passes. Its own
        ``meta["block_checks"]`` are what must hold of inputs that are block lists.

    Raises:
        UnsupportedAttentionError: for a ``flex_attention`` that can't be written out.
    """
    checks: list[BlockCheck] = []
    fake_mode, fakes = fake_inputs(gm, example_inputs)
    passed = fakes
    if lengths is not None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        with fake_mode, torch.no_grad():
            fakes = [*map(lengths.scale, placeholders, fakes)]
    with fake_mode, fx_traceback.preserve_node_meta():
        shadow = make_fx(
            _Inliner(gm, checks=checks).run,
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*fakes)
    _carry_over_placeholders(gm, shadow, example_inputs)
    for node, whole, own in zip(
        shadow.graph.find_nodes(op="placeholder"), fakes, passed, strict=True
    ):
        if whole is not own:
            node.meta[LOCAL] = own
    shadow.graph.eliminate_dead_code()
    shadow.recompile()
    shadow.meta["block_checks"] = tuple(checks)
    return shadow


def find_opaque(gm: GraphModule) -> Node | None:
    """The first call whose meaning a flat trace would lose; None if there is none.

    Tracing through a user's ``autograd.Function`` keeps its forward and drops its
    backward; a selective checkpoint's policy would be dropped too. A backward inside
    of the forward, as of ``torch.func.grad``, leaves no trace at all.
    """
    for node in gm.graph.nodes:
        target = node.target
        if target is AUTOGRAD_GRAD:
            return node  # type: ignore[no-any-return]
        if not isinstance(target, HigherOrderOperator) or target.name() == FLEX:
            continue
        body = node.args[0] if node.args else None
        if target.name() not in _INLINED or not isinstance(body, Node):
            return node  # type: ignore[no-any-return]
        inner = gm.get_submodule(str(body.target))
        if not isinstance(inner, GraphModule) or "_checkpoint_context_fn" in inner.meta:
            return node  # type: ignore[no-any-return]
        if (found := find_opaque(inner)) is not None:
            return found
    return None


def find_baked(shadow: GraphModule) -> Node | None:
    """The first constant that is a fake tensor: what made it left no trace."""
    for node in shadow.graph.find_nodes(op="get_attr"):
        if is_fake(getattr(shadow, str(node.target), None)):
            return node  # type: ignore[no-any-return]
    return None


def _carry_over_placeholders(
    gm: GraphModule, shadow: GraphModule, example_inputs: Sequence[object]
) -> None:
    old = gm.graph.find_nodes(op="placeholder")
    new = shadow.graph.find_nodes(op="placeholder")
    for before, after, value in zip(old, new, example_inputs, strict=True):
        after._rename(before.name)  # noqa: SLF001 - no public way keeps names unique
        after.meta["is_parameter"] = isinstance(value, nn.Parameter)
        after.meta["requires_grad"] = isinstance(value, Tensor) and value.requires_grad


class _Inliner(Interpreter):
    """Runs a Dynamo graph node by node, its bodies inlined, ``tags`` on their nodes."""

    _next_checkpoint = 0

    def __init__(
        self,
        gm: GraphModule,
        tags: dict[str, object] | None = None,
        move: Move | None = None,
        homes: dict[GraphModule, str] | None = None,
        *,
        checks: list[BlockCheck],
        scope: Scope | None = None,
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.checks = checks
        self.scope = scope or Scope(gm)
        self.node = next(iter(gm.graph.nodes))
        self.skipped = find_list_only(gm, _INLINED)
        self.tags = tags or {}
        self.move = move
        # The module whose call of a body was traced: its name is on the body's nodes.
        self.homes = {} if homes is None else homes
        self.autocasts: list[torch.autocast] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        try:
            return super().run(*args, **kwargs)
        finally:
            while self.autocasts:  # of a trace that failed
                self.autocasts.pop().__exit__(None, None, None)

    def run_node(self, n: Node) -> Any:  # noqa: ANN401
        if n in self.skipped:
            return None
        self.node = n
        return super().run_node(n)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        with _meta(self.entries):
            return super().call_method(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        name = str(target.name()) if hasattr(target, "name") else ""
        with _meta(self.entries):
            if name in _INLINED and isinstance(args[0], GraphModule):
                return self._inline(name, args, kwargs)
            if name == FLEX:
                outs, check = inline_flex(self.node, self.scope, args)
                self.checks += [check] if check else []
                return outs
            target = WRITTEN_OUT.get(target, target)
            if target in AUTOCAST_CALLS:
                return self._switch_autocast(target, args)
            return super().call_function(target, args, kwargs)

    def _switch_autocast(self, target: object, args: Any) -> object:  # noqa: ANN401
        """Record the call and do it too: a trace alone gives values of no autocast."""
        if target is ENTER_AUTOCAST:
            device_type, dtype, enabled, cache_enabled = args
            mode = torch.autocast(
                device_type, dtype, enabled, cache_enabled=cache_enabled
            )
            self.autocasts.append(mode)
            return mode.__enter__()
        self.autocasts.remove(args[0])
        return args[0].__exit__(None, None, None)

    @property
    def entries(self) -> dict[str, object]:
        """What the node at hand, and what it is traced into, carries."""
        stack = fx_traceback.current_meta.get("nn_module_stack")
        if self.move is None or not stack:
            return self.tags
        return self.tags | {"nn_module_stack": move_modules(stack, self.move)}

    def _inline(self, name: str, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        body, operands, tags = args[0], args[_INLINED[name] :], self.tags
        if name == "tag_activation_checkpoint":
            kwargs = {k: v for k, v in kwargs.items() if k not in _CHECKPOINT_OPTIONS}
            _Inliner._next_checkpoint += 1
            tags = tags | {
                "recompute": CheckpointPolicy.PREFER_RECOMPUTE,
                "ac_graph_id": _Inliner._next_checkpoint,
            }
        assert not kwargs, f"{name} with keyword operands {sorted(kwargs)}"
        caller = innermost_module(fx_traceback.current_meta)
        move = None
        if body in self.homes:
            home = self.homes[body]
            # One caller twice: with the same module inside or with another?
            move = Move(home if home != caller else "", caller)
        self.homes.setdefault(body, caller)
        scope = Scope(body, self.scope, self.node.args[_INLINED[name] :])
        inliner = _Inliner(
            body, tags, move, self.homes, checks=self.checks, scope=scope
        )
        return inliner.run(*operands)


@contextmanager
def _meta(entries: dict[str, object]) -> Iterator[None]:
    """Put entries on every node traced inside."""
    before = dict(fx_traceback.current_meta)
    fx_traceback.current_meta.update(entries)
    try:
        yield
    finally:
        fx_traceback.current_meta.clear()
        fx_traceback.current_meta.update(before)
