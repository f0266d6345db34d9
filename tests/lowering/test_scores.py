"""Softcap, biases and sinks in the ring against dense float64 references."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.ranks import RankPool
from support.ring_cases import Case, compile_ring
from support.score_cases import (
    ScoreCase,
    collect,
    run_score_case,
    run_score_cases,
    score_plan_text,
)
from support.score_kernels import expect_tile, run_tile
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from ringcompile import ops
from ringcompile.ir.mask import EmptyRow, Mask, causal
from ringcompile.ir.text import format_mask
from ringcompile.lowering.tiles import math

LIMITS = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2}


def check(ranks: RankPool, world_size: int, cases: list[ScoreCase]) -> None:
    results = ranks.run(run_score_cases, tuple(cases), world_size=world_size)
    for case, *by_rank in zip(cases, *results, strict=True):
        check_one(case, by_rank)


def check_one(case: ScoreCase, by_rank: list[list[Tensor]]) -> None:
    expected, limit = case.expected(), LIMITS[case.bias_dtype or case.base.dtype]
    largest = max(x.abs().max() for x in expected[1:])
    for name, got, want in zip(
        case.names, collect(case, by_rank), expected, strict=True
    ):
        # What is 0 in exact arithmetic has no relative error: of a head's bias it
        # is the rounding of all its pairs, here as in eager.
        size = max(want.abs().max(), largest / 3)
        error = (got.double() - want).abs().max() / size
        assert error < limit, (case, name, error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", ["natural", "hilbert"])
def test_a_tile_of_several_blocks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, order: str
) -> None:
    monkeypatch.setattr(math, "_Q_ROWS", 32)
    monkeypatch.setattr(math, "_KV_ROWS", 48)
    expected = expect_tile("cpu")
    largest = max(x.abs().max() for x in expected)
    for got, want in zip(run_tile("cpu", dtype, order), expected, strict=True):
        assert got.dtype == ops.accumulation_dtype(dtype)
        size = max(want.abs().max(), largest / 3)
        assert (got.double() - want).abs().max() <= LIMITS[dtype] * size


def test_buffers_grow_with_the_biases_alone() -> None:
    random = torch.Generator().manual_seed(0)
    S = 1500
    options: dict[str, Any] = {"mask": format_mask(Mask(causal())), "scale": 1.0}
    q, k, v = (torch.randn(1, 2, S, 4, generator=random) for _ in range(3))
    at, bias = torch.arange(S)[None], torch.randn(1, 2, 1, 2 * S - 1, generator=random)
    options |= {"relative": [0], "softcap": 2.0}
    with Largest() as largest:  # type: ignore[no-untyped-call]
        # Not by the ops: of those a mode sees the results alone.
        out, lse = math._masked_attention(q, k, v, at, at, [], [bias], **options)
        math._masked_attention_backward(
            *(v, q, k, v, out, lse, at, at, [], [bias]), **options, learned=[0]
        )
    assert largest.size == 2 * 128 * 1024


class Largest(TorchDispatchMode):
    """The size of the largest tensor that operators give, views left out."""

    size = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        del types
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            stored = out.untyped_storage().nbytes() // out.element_size()
            self.size = max(self.size, min(stored, out.numel()))
        return out


MIXED = ("dense", "keys", "relative", "heads")
LAYOUTS = ("contiguous", "zigzag", "striped", "hilbert")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_biases_on_every_layout(ranks: RankPool, world_size: int) -> None:
    check(
        ranks,
        world_size,
        [
            ScoreCase(Case("causal", layout, 37, dtype=torch.float64), MIXED, softcap)
            for layout, softcap in zip(LAYOUTS, (None, 1.5, None, 1.5), strict=True)
        ],
    )


def test_kinds_of_biases(ranks: RankPool) -> None:
    double = Case("window", "zigzag", 29, dtype=torch.float64)
    check(
        ranks,
        3,
        [
            ScoreCase(Case("padding", "striped", 37), ("one for all", "heads"), 1.5),
            ScoreCase(Case("all", length=29), ("keys of all", "fixed", "queries")),
            ScoreCase(double, ("relative of all", "hides"), has_sinks=True),
            ScoreCase(Case("all", "zigzag", 29), ("hides",)),
            ScoreCase(Case("all", "zigzag", 29), ("lowest", "keys")),
            ScoreCase(Case("all", "striped", 29), ("lowest",), has_sinks=True),
        ],
    )


def test_sinks(ranks: RankPool) -> None:
    empty = EmptyRow.MEAN_FILLED  # of which there is none, beside a sink
    check(
        ranks,
        3,
        [
            ScoreCase(Case("window", "zigzag", 37), has_sinks=True),
            ScoreCase(Case("padding", "striped", 37, empty=empty), has_sinks=True),
            ScoreCase(Case("causal", dtype=torch.float64), MIXED, 2.0, has_sinks=True),
            ScoreCase(Case("causal", dtype=torch.bfloat16), MIXED, 2.0, has_sinks=True),
        ],
    )


def test_dropout_and_checkpointing(ranks: RankPool) -> None:
    base = Case("causal", "zigzag", 29, dtype=torch.float64)
    every = ScoreCase(base, MIXED, 2.0, has_sinks=True, dropout=0.25)
    check(
        ranks,
        2,
        [
            every,
            replace(every, is_checkpointed=True),
            ScoreCase(Case("causal", stages=1), MIXED, bias_dtype=torch.bfloat16),
            ScoreCase(Case("causal", any_length=True), MIXED, 1.5),
            ScoreCase(Case("causal", block_order="hilbert"), MIXED, 1.5),
            ScoreCase(Case("padding", length=37, empty=EmptyRow.MEAN_FILLED), MIXED),
        ],
    )


def test_parts_with_selected_rows(ranks: RankPool) -> None:
    kinds = (*MIXED, "one for all")
    base = Case("longnet", "zigzag", 83, dtype=torch.float64)
    check(
        ranks,
        2,
        [
            ScoreCase(base, kinds, 1.5, has_sinks=True),
            ScoreCase(
                Case("longnet", "striped", 48), ("relative of all", "keys of all")
            ),
        ],
    )


def test_traced_by_aot_autograd(ranks: RankPool) -> None:
    base = Case("causal", "zigzag", 37, compile="expanded")
    every = ScoreCase(base, MIXED, 2.0, has_sinks=True)
    check(
        ranks,
        2,
        [
            every,
            replace(every, is_checkpointed=True),
            replace(every, base=replace(base, mask="longnet")),
        ],
    )


def test_frozen_inputs_have_no_gradient_and_cost_no_hang(ranks: RankPool) -> None:
    base = Case("causal", needs_grad=(False, False, False))
    check(
        ranks,
        3,
        [
            ScoreCase(replace(base, compile=compiler), biases, has_sinks=has_sinks)
            for compiler in ("eager", "expanded")
            for biases, has_sinks in ((("dense",), False), (("fixed",), True))
        ],
    )


def test_rows_without_a_key_under_an_added_mask(ranks: RankPool) -> None:
    base = Case("padding", "zigzag", 37, empty=EmptyRow.MEAN_ALL)
    case = ScoreCase(base, ("relative", "dense"), 1.5)
    check(ranks, 2, [case, replace(case, base=replace(base, compile="expanded"))])
    read = replace(case, base=replace(base, layout="contiguous"), reads_empty=True)
    names = dict(zip(case.names, range(len(case.names)), strict=True))
    want = read.expected()
    results = ranks.run(run_score_case, read, world_size=2)
    got = collect(read, results)
    for name in ("out", "dv"):  # d_v is that of a mean
        assert (got[names[name]].double() - want[names[name]]).abs().max() < 1e-5
    for name in ("dq", "dk", "d_relative", "d_dense"):
        x, true = got[names[name]].double(), want[names[name]]
        assert x.isnan().any()
        known = torch.where(x.isnan(), true, x)
        assert (known - true).abs().max() < 1e-5 * true.abs().max(), name


@pytest.mark.slow
def test_compiled_by_inductor(ranks: RankPool) -> None:
    base = Case("causal", length=32, compile="inductor")
    check(ranks, 2, [ScoreCase(base, ("dense", "relative"), 2.0, has_sinks=True)])


def attend_twice(
    group: ProcessGroup, rank: int, case: ScoreCase
) -> tuple[list[Tensor], list[Tensor]]:
    return run_score_case(group, rank, case), run_score_case(group, rank, case)


def test_two_runs_give_the_same_bits(ranks: RankPool) -> None:
    case = ScoreCase(Case("causal", "zigzag"), MIXED, 2.0, has_sinks=True)
    for first, second in ranks.run(attend_twice, case, world_size=2):
        assert all(map(torch.equal, first, second))


def test_gradients_of_blocks_know_what_changes_scores() -> None:
    S, block, softcap, scale = 40, 8, 1.5, 0.4
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.double)

    q, k, v, grad = (draw(2, 2, S, 4) for _ in range(4))
    bias, at = draw(1, 2, 1, 2 * S - 1), torch.arange(S)
    shares = torch.zeros(2, 2, S // block, S // block, dtype=torch.double)
    by_pair = shares.requires_grad_().repeat_interleave(block, 2)
    scores = softcap * torch.tanh(scale * (q @ k.mT) / softcap)
    scores = scores + bias[:, :, 0, at - at[:, None] + S - 1]
    scores = scores + by_pair.repeat_interleave(block, 3)
    scores = scores.masked_fill(at > at[:, None], -torch.inf)
    out = scores.softmax(-1) @ v
    (want,) = torch.autograd.grad(out, shares, grad)
    got = ops.BLOCK_GRADIENTS(
        *(grad, q, k, v, out.detach(), scores.detach().logsumexp(-1)),
        *(at[None], at[None], [], [bias], S // block, block),
        mask=format_mask(Mask(causal())),
        scale=scale,
        softcap=softcap,
        relative=[0],
    )
    assert (got - want).abs().max() < 1e-13


LENGTHS = (48, 96)


def run_lengths(group: ProcessGroup, rank: int, case: ScoreCase) -> list[list[Tensor]]:
    """Outputs and gradients by length, of one graph."""
    attend = compile_ring(score_plan_text(case, group, rank), case.base, dynamic=True)
    results = []
    for n, length in enumerate(LENGTHS):
        sized = replace(case, base=case.base.with_length(length))
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            results.append(run_score_case(group, rank, sized, attend=attend))
    return results


def test_any_length(ranks: RankPool) -> None:
    base = Case("causal", "zigzag", any_length=True, compile="expanded")
    case = ScoreCase(base, ("dense", "relative"), 1.5, has_sinks=True)
    by_rank = ranks.run(run_lengths, case, world_size=2)
    for n, length in enumerate(LENGTHS):
        sized = replace(case, base=base.with_length(length))
        check_one(sized, [results[n] for results in by_rank])
