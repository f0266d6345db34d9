"""``explain``: what the backend would do to a model, from one process without peers.

The model is compiled by a backend that runs the passes for a rank of a made-up group
and then lets the graph run eagerly. Invariant: the model is left as it was (buffers,
gradients, training flags), and so is the random state.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ringcompile.errors import RingCompileError
from ringcompile.preset import explain_presets, read_options
from ringcompile.report.read import GraphReader
from ringcompile.report.records import GraphReport
from ringcompile.report.report import Report


def explain(
    model: Callable[..., object],
    *args: object,
    world_size: int = 4,
    options: Mapping[str, object] | None = None,
    **kwargs: object,
) -> Report:
    """Say what ``torch.compile(model, backend="ring", options=options)`` would do.

    Runs the call once, eagerly, in this process; no process group is needed. What could
    not become a ring is reported, under any ``unsupported``.

    Args:
        model: a module or a function; not changed.
        args: what it is called with: the full tensors that every rank would pass, or
            with ``inputs="sharded"`` one rank's shards.
        world_size: the number of ranks P to explain it for.
        options: as for the backend; ``mesh`` is not looked at.
        kwargs: more of what it is called with.

    Returns:
        The report: print it, or look at its fields.

    Raises:
        OptionError: an option is unknown or not built.
        ValueError: ``world_size`` is not positive.
    """
    if world_size < 1:
        message = f"world_size={world_size}: at least one rank"
        raise ValueError(message)
    chosen = dict(options or {})
    chosen.pop("mesh", None)
    reader = GraphReader(
        read_options(chosen | {"unsupported": "gather"}),
        world_size,
        notes=explain_presets(chosen, world_size),
    )
    read_options(chosen)  # "unsupported" is checked too
    graphs: list[GraphReport] = []
    errors: list[RingCompileError] = []

    def capture(
        gm: GraphModule, example_inputs: Sequence[object]
    ) -> Callable[..., object]:
        try:
            graphs.append(reader.read(gm, example_inputs))
        except RingCompileError as error:  # Dynamo would wrap it in its own
            errors.append(error)
        return gm.forward

    model = getattr(model, "_orig_mod", model)  # of a compiled module
    dynamic = reader.options.inputs == "sharded"
    with _left_as_it_was(model):
        torch.compile(_fresh_call(), backend=capture, dynamic=dynamic)(
            model, *args, **kwargs
        )
    if errors:
        raise errors[0]
    return Report(world_size, tuple(graphs))


def _fresh_call() -> Callable[..., object]:
    """A function with a code object of its own.

    Dynamo keeps what it compiled by code object and stops after a few variants; so what
    is compiled here neither meets nor adds to what the user compiled.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401
        return self(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


@contextmanager
def _left_as_it_was(model: object) -> Iterator[None]:
    """Put back what a forward, or a backward inside of it, may change."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [(m, m.training) for m in modules]
    buffers = [
        (m, name, buffer, buffer.detach().clone())
        for m in modules
        for name, buffer in m.named_buffers(recurse=False)
    ]
    gradients = [(p, p.grad) for m in modules for p in m.parameters(recurse=False)]
    for parameter, _ in gradients:
        parameter.grad = None
    state = random.getstate()
    try:
        with torch.random.fork_rng(_cuda_devices()):
            yield
    finally:
        random.setstate(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer.copy_(before))
        for module, flag in flags:
            module.training = flag


def _cuda_devices() -> list[int]:
    ready = torch.cuda.is_available() and torch.cuda.is_initialized()
    return list(range(torch.cuda.device_count())) if ready else []
