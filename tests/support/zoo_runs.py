"""One training step of a row of the zoo, and how far it is from eager float64."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from support.compiling import Record, compile_ring
from support.ranks import RankError
from support.spine_models import Float64
from support.tolerances import (
    GRAD_MODEL_RTOL,
    assert_gradients_equal,
    assert_output_equal,
    max_error,
)
from support.zoo_expected import Expected, find_expected
from support.zoo_models import find_row
from support.zoo_rows import Attention, Inputs, ZooModel

Gradients = dict[str, Tensor | None]


@dataclass(frozen=True, slots=True)
class Cell:
    """A row of the zoo and how it is run.

    Attributes:
        name: of the row.
        attention: its implementation.
        cp_size: the number of ranks.
        compiler: as of ``compile_ring``.
    """

    name: str
    attention: Attention
    cp_size: int = 2
    compiler: str = "aot_eager"

    @property
    def row(self) -> ZooModel:
        return find_row(self.name)

    @property
    def expected(self) -> Expected:
        return find_expected(self.name, self.attention)

    def __str__(self) -> str:
        return f"{self.name}-{self.attention}-{self.cp_size}".replace(" ", "_")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one training step gives.

    Attributes:
        outputs: every float tensor that the model returns.
        loss: its own, or a weighted sum of its outputs.
        grads: of every parameter, and of every input that requires them.
    """

    outputs: tuple[Tensor, ...]
    loss: Tensor
    grads: Gradients


@dataclass(frozen=True, slots=True)
class Result:
    """What a rank found.

    Attributes:
        record: what the compiler made of the model.
        faults: what is out of tolerance; empty if all is right.
        output_error: largest error of outputs and loss, each by its largest value.
        grad_error: the same of gradients; where a gradient is all but 0, by the model's
            largest one times the two tolerances' ratio.
    """

    record: Record
    faults: tuple[str, ...]
    output_error: float
    grad_error: float


def build_model(row: ZooModel, attention: Attention, dtype: torch.dtype) -> nn.Module:
    """The model, with the same weights at every call.

    Weights are moved away from where they start: biases of 0, gains of 1 and scores
    near 0 would hide a term that is left out.
    """
    torch.manual_seed(0)
    model = row.build(attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.1)
    return model.to(dtype).train(row.is_training)


def make_inputs(row: ZooModel, dtype: torch.dtype) -> Inputs:
    """The row's batch, with floats in a dtype."""
    seen: dict[int, Tensor] = {}  # one tensor may be passed as query, key and value
    return {k: _cast(v, dtype, seen) for k, v in row.make_inputs().items()}


def _cast(value: Any, dtype: torch.dtype, seen: dict[int, Tensor]) -> Any:  # noqa: ANN401
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if id(value) not in seen:
        cast = value.detach().to(dtype)
        seen[id(value)] = cast.requires_grad_(value.requires_grad)
    return seen[id(value)]


def run_step(model: nn.Module, call: Callable[..., Any], inputs: Inputs) -> Outcome:
    """Forward, loss and backward; ``call`` is ``model`` or what it compiled to."""
    out = call(**inputs)
    outputs = _float_tensors(out)
    loss = getattr(out, "loss", None)
    if loss is None:
        loss = _sum_with_weights(outputs)
    if loss.requires_grad:
        loss.backward()
    grads: Gradients = {n: p.grad for n, p in model.named_parameters()}
    grads |= {
        f"input {name}": value.grad
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return Outcome(tuple(x.detach() for x in outputs), loss.detach(), grads)


def _float_tensors(out: object) -> list[Tensor]:
    leaves = tree_leaves(out)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _sum_with_weights(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    terms = []
    for x in outputs:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if x.requires_grad or not torch.is_grad_enabled():
            terms.append((x * weight.to(x.dtype)).sum())
    return torch.stack(terms).sum()


def run_reference(row: ZooModel, attention: Attention) -> Outcome:
    """The same step in eager float64."""
    model = build_model(row, attention, torch.float64)
    inputs = make_inputs(row, torch.float64)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64(), torch.set_grad_enabled(row.has_backward):
            return run_step(model, model, inputs)
    finally:
        torch.set_default_dtype(usual)


def run_cell(group: ProcessGroup | None, rank: int, cell: Cell) -> Result:
    """One training step on this rank, beside the same in eager float64."""
    torch._dynamo.reset()  # hundreds of models in one process
    row = cell.row
    want = run_reference(row, cell.attention)
    model = build_model(row, cell.attention, torch.float32)
    call, record = compile_ring(model, group, compiler=cell.compiler)
    with torch.set_grad_enabled(row.has_backward):
        got = run_step(model, call, make_inputs(row, torch.float32))
    if record.num_graphs > 1:
        _forget_zeros(got.grads, want.grads)
    output_error, grad_error = _measure(got, want)
    return Result(record, find_faults(got, want), output_error, grad_error)


def _forget_zeros(grads: Gradients, want: Gradients) -> None:
    """Drop zeros that eager doesn't have.

    torch.compile gives them, on one rank too, to a parameter whose output leaves its
    graph but not the next one: llava's ``post_layernorm``.
    """
    for name, grad in grads.items():
        if grad is not None and want[name] is None and not grad.any():
            grads[name] = None


def find_surprises(cell: Cell, record: Record) -> list[str]:
    """Where what the compiler made is other than the table says."""
    want = cell.expected
    gathers = tuple(sorted({gather.split(":")[0] for gather in record.gathers}))
    pairs = (
        ("rings", len(record.rings), want.rings),
        ("attentions gathered", len(record.refused), want.gathered),
        ("graphs", record.num_graphs, want.num_graphs),
        ("other gathers", gathers, tuple(sorted(want.gathers))),
        ("errors", "", want.error),
    )
    return [
        f"{what}: {found}, not {expected}"
        for what, found, expected in pairs
        if found != expected
    ] + [
        f"another reason: {refused}"
        for refused in record.refused
        if want.reason not in refused
    ]


def find_cause(error: RankError) -> str:
    """The line of a rank's traceback that names the exception, not Dynamo's around it."""
    lines = str(error).splitlines()
    named = [x for x in lines if re.match(r"[\w.]+(Error|Exception|Failed)\b", x)]
    inner = [x for x in named if "BackendCompilerFailed" not in x]
    return next(iter([*inner, *named]), "?")


def find_faults(got: Outcome, want: Outcome) -> tuple[str, ...]:
    """What is out of tolerance."""
    faults = []
    if len(got.outputs) != len(want.outputs):
        faults.append(f"{len(got.outputs)} outputs, not {len(want.outputs)}")
    named = {
        f"output {i}": pair
        for i, pair in enumerate(zip(got.outputs, want.outputs, strict=False))
    }
    for name, (mine, theirs) in {"loss": (got.loss, want.loss), **named}.items():
        try:
            assert_output_equal(mine, theirs, name)
        except AssertionError as error:
            faults.append(str(error))
    try:
        assert_gradients_equal(got.grads, want.grads)
    except AssertionError as error:
        faults.append(str(error))
    return tuple(faults)


def _measure(got: Outcome, want: Outcome) -> tuple[float, float]:
    outputs = zip((got.loss, *got.outputs), (want.loss, *want.outputs), strict=False)
    pairs = [
        (g, w)
        for name, w in want.grads.items()
        if w is not None and (g := got.grads[name]) is not None
    ]
    largest = max((_largest(w) for _, w in pairs), default=0.0)
    floor = largest * GRAD_MODEL_RTOL / 1e-5
    return (
        max((_relative(g, w, 0.0) for g, w in outputs), default=0.0),
        max((_relative(g, w, floor) for g, w in pairs), default=0.0),
    )


def _relative(got: Tensor, want: Tensor, floor: float) -> float:
    error = max_error(got, want)
    scale = max(_largest(want), floor)
    return error / scale if scale else error


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
