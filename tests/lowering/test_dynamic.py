"""One compiled graph serves many lengths."""

from collections.abc import Callable, Sequence

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
from ringcompile.lowering import program
from ringcompile.lowering.inductor import inductor_patches
from ringcompile.lowering.tiles import flex
from ringcompile.torch_private import compile_with_inductor

LAYOUTS = ("contiguous", "zigzag", "striped")
LENGTHS = (48, 96, 72, 120)


def run_lengths(
    group: ProcessGroup,
    rank: int,
    case: Case,
    backend: str,
    lengths: tuple[int, ...] = LENGTHS,
    mark: Callable[..., None] = torch._dynamo.mark_dynamic,
) -> tuple[list[int], list[tuple[Tensor | None, ...]]]:
    """How often it had compiled, and out, dq, dk, dv, after each length."""
    compiled = 0

    def compile_once(gm: GraphModule, example: list[Tensor]) -> Callable[..., object]:
        nonlocal compiled
        compiled += 1
        if backend == "inductor":
            return compile_with_inductor(gm, example, inductor_patches({}))
        return compile_expanded(gm, example)

    plan = plan_text(case, group, rank, timeout_s=120.0)

    def attend(q: Tensor, k: Tensor, v: Tensor, *captures: Tensor) -> Tensor:
        out: Tensor = ops.RING_ATTENTION(q, k, v, list(captures), [], plan=plan)
        return out.sin()

    model = torch.compile(attend, backend=compile_once, fullgraph=True)
    counts = list[int]()
    results: list[tuple[Tensor | None, ...]] = []
    for length in lengths:
        sized = case.with_length(length)
        at = torch.tensor(Layout(case.layout, group.size()).positions(rank, length))
        q, k, v, grad = (x[:, :, at] for x in sized.tensors())
        for x in (q, k, v):
            mark(x, 2)
            x.requires_grad_()
        captures = sized.captures
        for x in captures:
            mark(x, 1)
        out = model(q, k, v, *captures)
        out.backward(grad)
        counts.append(compiled)
        results.append((out.detach(), q.grad, k.grad, v.grad))
    return counts, results


def check(ranks: RankPool, case: Case, backend: str, world_size: int) -> None:
    by_rank = ranks.run(run_lengths, case, backend, world_size=world_size)
    assert [counts for counts, _ in by_rank] == [[1] * len(LENGTHS)] * world_size
    compare([results for _, results in by_rank], case, LENGTHS)


def compare(
    by_rank: Sequence[Sequence[tuple[Tensor | None, ...]]],
    case: Case,
    lengths: Sequence[int],
) -> None:
    for n, length in enumerate(lengths):
        sized = case.with_length(length)
        q, k, v, grad = (x.double() for x in sized.tensors())
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = sized.attend_dense(*inputs).sin()
        want = (out.detach(), *torch.autograd.grad(out, inputs, grad))
        shards = zip(*(results[n] for results in by_rank), strict=True)
        for got, expected in zip(shards, want, strict=True):
            error = (join(sized, got).double() - expected).abs().max()
            assert error < 1e-5, (case, length, error)


def run_flex(
    group: ProcessGroup, rank: int, case: Case, lengths: tuple[int, ...]
) -> tuple[list[int], list[tuple[Tensor | None, ...]]]:
    """``run_lengths``, with a GPU's guards and kernels, those in their eager form."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (program, flex):
            patch.setattr(module, "has_flex_kernel", lambda *_: True)
        mark = torch._dynamo.maybe_mark_dynamic
        return run_lengths(group, rank, case, "expanded", lengths, mark)


def test_whether_rows_fill_blocks_is_guarded_alike_on_all_ranks(
    ranks: RankPool,
) -> None:
    """One that compiles anew alone waits for the others, and they for its rows."""
    case = Case("documents", "zigzag", any_length=True)
    lengths = (256, 400, 1024, 2048, 160)
    by_rank = ranks.run(run_flex, case, lengths, world_size=2)
    assert [counts for counts, _ in by_rank] == [[1, 2, 3, 3, 3]] * 2
    compare([results for _, results in by_rank], case, lengths)


def test_how_many_blocks_a_piece_has_is_guarded_alike_on_all_ranks(
    ranks: RankPool,
) -> None:
    """A striped rank ahead of another reads a row less of its: one block of 129."""
    case = Case("causal", "striped", kernel="flex", any_length=True)
    lengths = (520, 258, 600)
    by_rank = ranks.run(run_flex, case, lengths, world_size=2)
    assert [counts for counts, _ in by_rank] == [[1, 2, 2]] * 2
    compare([results for _, results in by_rank], case, lengths)


EACH = [(x, y) for x in LAYOUTS for y in ("causal", "padding", "all")]


@pytest.mark.parametrize("layout_and_mask", one_in(2, EACH), ids="-".join)
def test_any_length(ranks: RankPool, layout_and_mask: tuple[str, str]) -> None:
    layout, mask = layout_and_mask
    check(ranks, Case(mask, layout, any_length=True), "expanded", 2)


@pytest.mark.slow
def test_any_length_with_inductor(ranks: RankPool) -> None:
    check(ranks, Case("causal", "zigzag", any_length=True), "inductor", 2)


def run_open_heads(group: ProcessGroup, rank: int, case: Case) -> Tensor:
    plan = plan_text(case, group, rank, timeout_s=120.0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ops.RING_ATTENTION(q, k, v, [], [], plan=plan)
        return out

    model = torch.compile(attend, backend=compile_expanded, fullgraph=True)
    inputs = case.tensors()[:3]
    for x in inputs:
        torch._dynamo.maybe_mark_dynamic(x, 1)
    with torch.no_grad():
        return model(*inputs)


def test_a_window_is_cut_whatever_number_of_heads(ranks: RankPool) -> None:
    case = Case("wide window", "contiguous", 96)
    (out,) = ranks.run(run_open_heads, case, world_size=1)
    want = case.attend_dense(*(x.double() for x in case.tensors()[:3]))
    assert (out.double() - want).abs().max() < 1e-5
