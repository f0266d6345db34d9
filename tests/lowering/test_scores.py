"""Softcap, biases and sinks in the ring against dense float64 references."""

from dataclasses import replace

import pytest
import torch
from support.ranks import RankPool
from support.ring_cases import Case
from support.score_cases import ScoreCase, collect, run_score_case, run_score_cases
from torch import Tensor
from torch.distributed import ProcessGroup

from ringcompile.ir.mask import EmptyRow

LIMITS = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2}


def check(ranks: RankPool, world_size: int, cases: list[ScoreCase]) -> None:
    results = ranks.run(run_score_cases, tuple(cases), world_size=world_size)
    for case, *by_rank in zip(cases, *results, strict=True):
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
    base = Case("causal", "zigzag", 37, compile="aot_eager")
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


def test_compiled_by_inductor(ranks: RankPool) -> None:
    base = Case("causal", length=37, compile="inductor")
    check(ranks, 2, [ScoreCase(base, MIXED, 2.0, has_sinks=True)])


def attend_twice(
    group: ProcessGroup, rank: int, case: ScoreCase
) -> tuple[list[Tensor], list[Tensor]]:
    return run_score_case(group, rank, case), run_score_case(group, rank, case)


def test_two_runs_give_the_same_bits(ranks: RankPool) -> None:
    case = ScoreCase(Case("causal", "zigzag"), MIXED, 2.0, has_sinks=True)
    for first, second in ranks.run(attend_twice, case, world_size=2):
        assert all(map(torch.equal, first, second))
