"""One attention with a pattern by option, compiled whole on some ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from support.compiling import compile_ring
from support.pattern_cases import CASES

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    Attributes:
        name: of a case in ``pattern_cases``.
        is_causal: whether the user's mask is causal.
        layout: of the option.
        heads: H and G.
        length: tokens S.
        dtype: of q, k and v.
        seed: of their values.
    """

    name: str
    is_causal: bool = True
    layout: str = "contiguous"
    heads: tuple[int, int] = (4, 2)
    length: int = 43
    dtype: torch.dtype = torch.float32
    seed: int = 0

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
        out = CASES[self.name].attend(q, k, v, is_causal=self.is_causal)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


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
        options={
            "attention": CASES[cell.name].pattern,
            "layout": cell.layout,
            "unsupported": "error",
        },
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
