"""One attention with a pattern by option, compiled whole on some ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ringcompile.ir.layout import LAYOUTS
from support.compiling import compile_ring
from support.pattern_cases import ADAPTIVE, CASES, PatternCase
from support.preset_cases import PRESETS
from support.tolerances import OUTPUT_RTOL, max_error

NAMES = ("out", "dq", "dk", "dv")
HEADS = ((4, 2), (4, 4), (5, 1))


@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    Attributes:
        name: of a case in ``pattern_cases`` or ``preset_cases``.
        is_causal: whether the user's mask is causal.
        layout: of the option; a preset that has one keeps its own.
        heads: H and G.
        length: tokens S.
        dtype: of q, k and v.
        seed: of their values.
        kernel: of the option; a preset that has one keeps its own.
    """

    name: str
    is_causal: bool = True
    layout: str = "contiguous"
    heads: tuple[int, int] = (4, 2)
    length: int = 43
    dtype: torch.dtype = torch.float32
    seed: int = 0
    kernel: str = "auto"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output."""
        (H, G), S, D = self.heads, self.length, 8
        random = torch.Generator().manual_seed(self.seed)
        q, k, v, grad = (
            torch.randn(2, heads, S, D, generator=random, dtype=torch.float64)
            for heads in (H, G, G, H)
        )
        q, k, v, grad = (x.to(self.dtype) for x in (q, k, v, grad))
        return q, k, v, grad

    @lru_cache  # noqa: B019 - every rank is compared with each
    def expected(self) -> tuple[Tensor, ...]:
        """out, dq, dk and dv by the dense reference."""
        *inputs, grad = (x.double() for x in self.tensors())
        q, k, v = (x.requires_grad_() for x in inputs)
        out = find_case(self.name).attend(q, k, v, is_causal=self.is_causal)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)

    def options(self) -> dict[str, Any]:
        """The backend's, beside the mesh."""
        own: dict[str, object] = {"attention": find_case(self.name).pattern}
        if self.name in PRESETS:
            own = PRESETS[self.name].options()
        given = {"layout": self.layout, "kernel": self.kernel, "unsupported": "error"}
        return given | own


def find_case(name: str) -> PatternCase:
    """What a cell of this name computes."""
    if name in PRESETS:
        return PRESETS[name].meaning
    return ADAPTIVE[name] if name in ADAPTIVE else CASES[name]


def sweep(name: str, cp_size: int) -> list[Cell]:
    """Both masks x layouts x heads; one rank has one layout, and some presets too."""
    layouts: tuple[str, ...] = LAYOUTS if cp_size > 1 else ("auto",)
    heads: tuple[tuple[int, int], ...] = HEADS
    if name in PRESETS:
        case = PRESETS[name]
        layouts = ("auto",) if "layout" in case.own else layouts
        heads = HEADS if case.heads in HEADS else (case.heads,)
    return [
        Cell(name, is_causal, layout, some)
        for is_causal in (True, False)
        for layout in layouts
        for some in heads
    ]


class Attention(nn.Module):
    """What a user writes."""

    def __init__(self, *, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            *(q, k, v), is_causal=self.is_causal, enable_gqa=True
        )


def run_cells(
    group: ProcessGroup, rank: int, cells: tuple[Cell, ...], compiler: str = "eager"
) -> list[tuple[Tensor, ...]]:
    return [run_cell(group, rank, cell, compiler) for cell in cells]


def compile_cell(
    group: ProcessGroup, cell: Cell, compiler: str = "eager"
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The cell's attention as a function of q, k and v; else it is an error."""
    torch.compiler.reset()
    call, _ = compile_ring(
        Attention(is_causal=cell.is_causal),
        group,
        compiler=compiler,
        options=cell.options(),
    )
    return call


def run_cell(
    group: ProcessGroup, _rank: int, cell: Cell, compiler: str = "eager"
) -> tuple[Tensor, ...]:
    """out, dq, dk and dv, whole."""
    call = compile_cell(group, cell, compiler)
    *values, grad = cell.tensors()
    q, k, v = (x.requires_grad_() for x in values)
    out = call(q, k, v)
    out.backward(grad)
    return out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)


def relative_errors(cell: Cell, got: Iterable[Tensor]) -> dict[str, float]:
    """Largest errors of out, dq, dk and dv by the largest value of each."""
    return {
        name: max_error(ours, want) / want.abs().max().item()
        for name, ours, want in zip(NAMES, got, cell.expected(), strict=True)
    }


def check_errors(cell: Cell, got: Iterable[Tensor]) -> None:
    """Require each within 1e-5."""
    for name, error in relative_errors(cell, got).items():
        assert error <= OUTPUT_RTOL, (cell, name, error)


def error_ratios(
    cell: Cell, got: Iterable[Tensor], one_rank: Iterable[Tensor]
) -> dict[str, float]:
    """Largest errors of out, dq, dk and dv by those of one rank in the same dtype."""
    values = zip(NAMES, got, one_rank, cell.expected(), strict=True)
    return {
        name: max_error(ours, want) / max(max_error(one, want), 1e-300)
        for name, ours, one, want in values
    }
