"""Programs of a fuzzer: lists of torch calls that become graphs as Dynamo makes them.

A program is written once and run in any float dtype; it prints as Python.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from ringcompile.config import RingOptions


class Number(Enum):
    """Arguments that depend on the dtype a program is run in."""

    FLOAT = "the float dtype"
    LOWEST = "its lowest number"

    def of(self, dtype: torch.dtype) -> object:
        return dtype if self is Number.FLOAT else torch.finfo(dtype).min


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of an input or of a line."""

    name: str


@dataclass(frozen=True, slots=True)
class Line:
    """One call.

    Attributes:
        name: of its result.
        target: a function, or the name of a method.
        args: its arguments; ``Ref`` for values, ``Number`` for what a dtype decides.
        kwargs: the same by name.
    """

    name: str
    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def reads(self) -> list[str]:
        found: list[str] = []
        tree_map_only(
            Ref, lambda r: found.append(r.name), (self.args, dict(self.kwargs))
        )
        return found


@dataclass(frozen=True, slots=True)
class Input:
    """One input.

    Attributes:
        name: of its placeholder.
        value: float64 where it is float.
        is_parameter: whether it is a parameter of the model.
        needs_grad: whether it has a gradient.
    """

    name: str
    value: Tensor
    is_parameter: bool = False
    needs_grad: bool = False

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """A fresh leaf."""
        x = self.value
        x = x.to(dtype, copy=True) if x.is_floating_point() else x.clone()
        if self.is_parameter:
            return nn.Parameter(x, requires_grad=self.needs_grad)
        return x.requires_grad_(self.needs_grad)


@dataclass(frozen=True, slots=True)
class Program:
    """A small model and how it is to be compiled.

    Attributes:
        inputs: parameters and arguments.
        lines: the calls, in order.
        outputs: names of what it returns.
        size: number of ranks.
        options: of the backend.
        dtype: float dtype to run it in.
    """

    inputs: tuple[Input, ...]
    lines: tuple[Line, ...]
    outputs: tuple[str, ...]
    size: int
    options: RingOptions
    dtype: torch.dtype

    def build(self, dtype: torch.dtype) -> GraphModule:
        """The graph, as Dynamo would hand it over."""
        graph = Graph()
        env: dict[str, Node] = {x.name: graph.placeholder(x.name) for x in self.inputs}
        for line in self.lines:
            args, kwargs = _resolve((line.args, dict(line.kwargs)), env, dtype)
            kind = "call_method" if isinstance(line.target, str) else "call_function"
            env[line.name] = graph.create_node(
                kind, line.target, args, kwargs, name=line.name
            )
        graph.output(tuple(env[name] for name in self.outputs))
        return GraphModule({}, graph)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The program in eager mode, in the dtype of its float inputs."""
        env: dict[str, Any] = {
            given.name: x for given, x in zip(self.inputs, inputs, strict=True)
        }
        dtypes = [x.dtype for x in inputs if x.is_floating_point()]
        for line in self.lines:
            env[line.name] = evaluate(line, env, dtypes[0])
        return tuple(env[name] for name in self.outputs)

    def make_inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Fresh leaves, in the order of the placeholders."""
        return [x.in_dtype(dtype) for x in self.inputs]

    def without_dead_code(self) -> "Program":
        """The lines and inputs that outputs need, and writes in place to those."""
        needed = set(self.outputs)
        kept: list[Line] = []
        for line in reversed(self.lines):
            is_write = isinstance(line.target, str) and line.target.endswith("_")
            if line.name in needed or (is_write and line.reads[0] in needed):
                kept.append(line)
                needed.update(line.reads)
        inputs = tuple(x for x in self.inputs if x.name in needed)
        return replace(self, lines=tuple(reversed(kept)), inputs=inputs)

    def __str__(self) -> str:
        graph = self.build(self.dtype)
        shapes = [
            f"# {x.name}: {tuple(x.value.shape)} {x.value.dtype}"
            f"{' parameter' * x.is_parameter}{' with gradient' * x.needs_grad}"
            + (f" = {x.value.tolist()}" if not x.value.is_floating_point() else "")
            for x in self.inputs
        ]
        default = RingOptions()
        options = {
            name: value
            for name in RingOptions.__dataclass_fields__
            if (value := getattr(self.options, name)) != getattr(default, name)
        }
        head = f"# {self.size} ranks, options={options}, {self.dtype}"
        return "\n".join([head, *shapes, graph.code.strip()])


def _resolve(tree: Any, env: Mapping[str, Any], dtype: torch.dtype) -> Any:  # noqa: ANN401
    tree = tree_map_only(Ref, lambda r: env[r.name], tree)
    return tree_map_only(Number, lambda n: n.of(dtype), tree)


def evaluate(
    line: Line, env: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> Any:  # noqa: ANN401
    """The result of one line."""
    args, kwargs = _resolve((line.args, dict(line.kwargs)), env, dtype)
    if isinstance(line.target, str):
        return getattr(args[0], line.target)(*args[1:], **kwargs)
    return line.target(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program gives.

    Attributes:
        outputs: by the names of the program's.
        grads: of every input that has one, or None.
    """

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor | None]


def run_program(
    program: Program, call: Callable[..., Sequence[Tensor]], dtype: torch.dtype
) -> Outcome:
    """Forward, a loss outside over all float outputs, backward."""
    leaves = program.make_inputs(dtype)
    outputs = call(*leaves)
    losses = [
        (y * _weights_like(y)).sum()
        for y in outputs
        if y.is_floating_point() and y.requires_grad
    ]
    wanted = [
        x for x, given in zip(leaves, program.inputs, strict=True) if given.needs_grad
    ]
    names = [x.name for x in program.inputs if x.needs_grad]
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if losses and wanted:
        total = torch.stack([x.double() for x in losses]).sum()
        grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return Outcome(
        {n: y.detach() for n, y in zip(program.outputs, outputs, strict=True)},
        dict(zip(names, grads, strict=True)),
    )


def _weights_like(y: Tensor) -> Tensor:
    """Fixed numbers between 1/2 and 3/2, no two places alike."""
    return (
        torch.linspace(0, 40, y.numel(), dtype=y.dtype).sin().reshape(y.shape) / 2 + 1
    )
