"""Run a spelling, or what looks like one, on a rank, and compare it with eager."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from support.compiling import Record, compile_ring
from support.flex import trained_on_cpu
from support.flex_cases import find_flex
from support.lookalikes import alone, beside_attention
from support.spellings import Spelling, build_spelling, find_spelling, make_inputs
from support.spine_models import Float64
from support.tolerances import assert_gradients_equal, assert_output_equal

Outcome = tuple[Tensor, dict[str, Tensor | None]]


def run_named(
    group: ProcessGroup, rank: int, table: str, name: str
) -> tuple[Record, list[str]]:
    """One forward and backward on this rank, and what is wrong with it.

    Args:
        group: the ranks.
        rank: this one.
        table: ``spelling`` or ``flex``; or ``alone`` or ``beside`` an attention for look-alikes.
        name: of the row.
    """
    return run_rank(group, rank, _TABLES[table](name), "eager")


_TABLES: dict[str, Callable[[str], Spelling]] = {
    "spelling": find_spelling,
    "flex": find_flex,
    "alone": alone,
    "beside": beside_attention,
}


def run_rank(
    group: ProcessGroup, rank: int, spelling: Spelling, compiler: str
) -> tuple[Record, list[str]]:
    """The same for any row and compiler, without a warning."""
    with warnings.catch_warnings(), trained_on_cpu():
        warnings.simplefilter("ignore")
        return _run_rank(group, spelling, compiler)


def _run_rank(
    group: ProcessGroup, spelling: Spelling, compiler: str
) -> tuple[Record, list[str]]:
    torch.compiler.reset()  # the modules share their code, whose cache is small
    model, inputs = make_call(spelling, torch.float32)
    call, record = compile_ring(model, group, compiler=compiler)
    return record, find_faults(_run(model, call, inputs), run_eager(spelling))


def make_call(
    spelling: Spelling, dtype: torch.dtype, *, alike: bool = False
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module and what it is called with; ``alike``: see ``build_spelling``."""
    model = build_spelling(spelling, dtype, alike=alike)
    inputs = make_inputs(spelling, dtype)
    if not spelling.has_gradients:
        model.requires_grad_(requires_grad=False)
        inputs = {n: x.detach() for n, x in inputs.items()}
    return model, inputs


def run_eager(spelling: Spelling) -> Outcome:
    """The same in eager float64."""
    model, inputs = make_call(spelling, torch.float64, alike=True)
    with Float64():
        return _run(model, model, inputs)


def _run(
    model: nn.Module, call: Callable[..., Any], inputs: Mapping[str, Tensor]
) -> Outcome:
    out = call(*inputs.values())
    assert isinstance(out, Tensor), "a spelling returns one tensor"
    leaves = dict(model.named_parameters()) | {
        n: x for n, x in inputs.items() if x.is_floating_point()
    }
    wanted = {n: x for n, x in leaves.items() if x.requires_grad}
    if not wanted:
        return out.detach(), {}
    weight = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    (out.sin() * weight).sum().backward()
    return out.detach(), {n: x.grad for n, x in wanted.items()}


def find_faults(got: Outcome, want: Outcome) -> list[str]:
    """What differs from eager: texts."""
    checks: tuple[Callable[[], None], ...] = (
        lambda: assert_output_equal(got[0], want[0]),
        lambda: assert_gradients_equal(got[1], want[1]),
    )
    faults = []
    for check in checks:
        try:
            check()
        except AssertionError as error:
            faults.append(str(error))
    return faults
