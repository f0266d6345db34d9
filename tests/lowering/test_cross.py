"""The ring op where keys are another sequence, against the dense float64 reference."""

from collections.abc import Sequence

import pytest
import torch
from support.ranks import RankPool
from support.ring_cases import Case, join, run_cases, run_inference
from support.sampling import slow

from ringcompile.ir.layout import LAYOUTS
from ringcompile.ir.mask import EmptyRow

LIMITS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2}
LENGTHS = ((48, 20), (37, 48), (5, 64), (64, 5), (40, 40), (3, 2))


def check(ranks: RankPool, world_size: int, cases: Sequence[Case]) -> None:
    results = ranks.run(run_cases, tuple(cases), world_size=world_size)
    for case, *by_rank in zip(cases, *results, strict=True):
        for n, want in enumerate(case.expected()):
            if n and not case.needs_grad[n - 1]:
                assert all(shards[n] is None for shards in by_rank), (case, n)
                continue
            got = join(case, [shards[n] for shards in by_rank], of_keys=n > 1)
            assert got.dtype == case.dtype
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < LIMITS[case.dtype], (case, n, error)


@pytest.mark.parametrize("world_size", [1, slow(2), 3, slow(4)])
def test_every_pair_of_layouts(ranks: RankPool, world_size: int) -> None:
    check(
        ranks,
        world_size,
        [
            Case(mask, layout, S, keys=keys, key_layout=key_layout)
            for layout in LAYOUTS
            for key_layout in LAYOUTS
            for n, mask in enumerate(("all", "causal", "bidirectional padding"))
            for S, keys in LENGTHS[n::3]
        ],
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_masks_that_compare_positions_of_two_sequences(
    ranks: RankPool, world_size: int
) -> None:
    check(
        ranks,
        world_size,
        [
            Case(mask, layout, S, keys=keys, key_layout=key_layout)
            for mask in ("causal", "window", "two-sided window", "padding")
            for layout, key_layout in (("zigzag", "contiguous"), ("striped", "zigzag"))
            for S, keys in ((48, 96), (41, 96), (96, 40))
        ],
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_without_a_key(ranks: RankPool, world_size: int) -> None:
    check(
        ranks,
        world_size,
        [
            Case(mask, layout, S, empty=empty, keys=keys, key_layout="zigzag")
            for empty in (EmptyRow.MEAN_ALL, EmptyRow.MEAN_FILLED, EmptyRow.ZERO)
            for mask in ("window", "padding")
            for layout in ("contiguous", "striped")
            for S, keys in ((48, 21), (37, 20))
        ],
    )


def test_heads_dtypes_stages_and_kernels(ranks: RankPool) -> None:
    check(
        ranks,
        3,
        [
            Case("all", heads=(4, 4, 16, 16), keys=20),
            Case("all", "zigzag", heads=(4, 1, 16, 8), keys=65),
            Case("causal", heads=(4, 1, 16, 16), keys=20, key_layout="zigzag"),
            Case("bidirectional padding", dtype=torch.bfloat16, keys=31),
            Case("all", "striped", dtype=torch.bfloat16, keys=96),
            Case("padding", dtype=torch.float64, keys=31),
            Case("all", stages=1, keys=96),
            Case("causal", stages=2, keys=96),
            Case("causal", kernel="math", keys=31),
            Case("all", kernel="math", keys=31, key_layout="striped"),
            Case("all", any_length=True, keys=24),
            Case("bidirectional padding", "zigzag", any_length=True, keys=96),
            Case("all", "striped", any_length=True, keys=12, key_layout="zigzag"),
        ],
    )


@pytest.mark.parametrize(
    "needs_grad",
    [(True, False, False), (False, True, False), (False, False, True)],
)
def test_frozen_inputs(ranks: RankPool, needs_grad: tuple[bool, bool, bool]) -> None:
    check(ranks, 3, [Case("all", "zigzag", 37, needs_grad=needs_grad, keys=20)])


def test_without_gradients(ranks: RankPool) -> None:
    case = Case("causal", needs_grad=(False, False, False), keys=31)
    out, want = (
        join(case, ranks.run(run_inference, case, world_size=2)),
        case.expected(),
    )
    assert (out.double() - want[0]).abs().max() < 3e-6 * want[0].abs().max()


def test_traced_by_aot_autograd(ranks: RankPool) -> None:
    check(
        ranks,
        3,
        [
            Case("all", compile="expanded", keys=20),
            Case("causal", "zigzag", 37, stages=2, compile="expanded", keys=96),
            Case("padding", "striped", 37, compile="expanded", keys=64),
            Case("padding", empty=EmptyRow.MEAN_ALL, compile="expanded", keys=20),
        ],
    )


@pytest.mark.slow
def test_compiled_by_inductor(ranks: RankPool) -> None:
    check(ranks, 2, [Case("padding", "zigzag", 37, compile="inductor", keys=64)])
