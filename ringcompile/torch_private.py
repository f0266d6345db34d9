"""Every private API of torch that we use, for torch 2.11 and 2.13, in one place."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# ---- tracing -------------------------------------------------------------------------


def fake_inputs(
    gm: GraphModule, example_inputs: Sequence[object]
) -> tuple[FakeTensorMode, list[object]]:
    """Fake versions of a Dynamo graph's inputs in the mode of the compile at hand.

    The placeholders' ``example_value`` belong to a mode that Dynamo has left, and
    mixing modes fails; so each input is made fake anew, with its own symbols.
    """
    context = TracingContext.try_get()
    placeholders = gm.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(example_inputs), "one example per placeholder"
    if context is None or context.fake_mode is None:
        found = [x.fake_mode for x in example_inputs if isinstance(x, FakeTensor)]
        mode = found[0] if found else _new_fake_mode()
        return mode, [
            mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x
            for x in example_inputs
        ]
    mode = context.fake_mode
    return mode, [
        _fake_input(mode, context, x, node.meta.get("example_value", x))
        for node, x in zip(placeholders, example_inputs, strict=True)
    ]


def _new_fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def _fake_input(
    mode: FakeTensorMode, context: TracingContext, value: object, example: object
) -> object:
    if not isinstance(value, Tensor):
        return example
    if isinstance(value, FakeTensor) and value.fake_mode is mode:
        return value
    symbolic = context.tensor_to_context.get(value)
    return mode.from_tensor(
        value,
        static_shapes=symbolic is None,
        symbolic_context=symbolic,
        source=getattr(symbolic, "tensor_source", None),
    )


# ---- lowering ------------------------------------------------------------------------
