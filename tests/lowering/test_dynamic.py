"""One compiled graph serves many lengths."""

from collections.abc import Callable

import pytest
import torch
from support.compiling import compile_expanded
from support.ranks import RankPool
from support.ring_cases import Case, join, plan_text
from support.sampling import one_in
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.fx import GraphModule

from ringcompile import ops
from ringcompile.ir.layout import Layout
from ringcompile.lowering.inductor import inductor_patches
from ringcompile.torch_private import compile_with_inductor

LAYOUTS = ("contiguous", "zigzag", "striped")
LENGTHS = (48, 96, 72, 120)


def run_lengths(
    group: ProcessGroup, rank: int, case: Case, backend: str
) -> tuple[int, list[tuple[Tensor | None, ...]]]:
    """How often it compiled, and out, dq, dk, dv for each length."""
    compiled = 0

    def compile_once(gm: GraphModule, example: list[Tensor]) -> Callable[..., object]:
        nonlocal compiled
        compiled += 1
        if backend == "inductor":
            return compile_with_inductor(gm, example, inductor_patches({}))
        return compile_expanded(gm, example)

    plan = plan_text(case, group, rank, timeout_s=120.0)

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        out: Tensor = ops.RING_ATTENTION(q, k, v, [padding, padding], [], plan=plan)
        return out.sin()

    model = torch.compile(attend, backend=compile_once, fullgraph=True)
    results: list[tuple[Tensor | None, ...]] = []
    for length in LENGTHS:
        sized = case.with_length(length)
        at = torch.tensor(Layout(case.layout, group.size()).positions(rank, length))
        q, k, v, grad = (x[:, :, at] for x in sized.tensors())
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
            x.requires_grad_()
        padding = sized.captures[1]
        torch._dynamo.mark_dynamic(padding, 1)
        out = model(q, k, v, padding)
        out.backward(grad)
        results.append((out.detach(), q.grad, k.grad, v.grad))
    return compiled, results


def check(ranks: RankPool, case: Case, backend: str, world_size: int) -> None:
    by_rank = ranks.run(run_lengths, case, backend, world_size=world_size)
    assert [compiled for compiled, _ in by_rank] == [1] * world_size
    for n, length in enumerate(LENGTHS):
        sized = case.with_length(length)
        q, k, v, grad = (x.double() for x in sized.tensors())
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = sized.attend_dense(*inputs).sin()
        want = (out.detach(), *torch.autograd.grad(out, inputs, grad))
        shards = zip(*(results[n] for _, results in by_rank), strict=True)
        for got, expected in zip(shards, want, strict=True):
            error = (join(sized, got).double() - expected).abs().max()
            assert error < 1e-5, (case, length, error)


EACH = [(x, y) for x in LAYOUTS for y in ("causal", "padding", "all")]


@pytest.mark.parametrize("layout_and_mask", one_in(2, EACH), ids="-".join)
def test_any_length(ranks: RankPool, layout_and_mask: tuple[str, str]) -> None:
    layout, mask = layout_and_mask
    check(ranks, Case(mask, layout, any_length=True), "expanded", 2)


@pytest.mark.slow
def test_any_length_with_inductor(ranks: RankPool) -> None:
    check(ranks, Case("causal", "zigzag", any_length=True), "inductor", 2)
