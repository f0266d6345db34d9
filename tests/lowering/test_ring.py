"""The ring op on gloo ranks against the dense float64 reference."""

import pytest
import torch
from support.ranks import RankPool
from support.ring_cases import Case, join, run_cases

from ringcompile.ir.mask import EmptyRow

MASKS = (
    "all",
    "causal",
    "window",
    "two-sided window",
    "documents",
    "padding",
    "bidirectional padding",
)
LAYOUTS = ("contiguous", "zigzag", "striped")


def check(ranks: RankPool, world_size: int, cases: list[Case]) -> None:
    results = ranks.run(run_cases, tuple(cases), world_size=world_size)
    for case, *by_rank in zip(cases, *results, strict=True):
        needed = (True, *case.needs_grad)
        for name, want, shards, is_needed in zip(
            ("out", "dq", "dk", "dv"), case.expected(), zip(*by_rank), needed, strict=True
        ):
            if not is_needed:
                assert all(x is None for x in shards), (case, name)
                continue
            got = join(case, list(shards))
            assert got.dtype == case.dtype
            error = (got.double() - want).abs().max() / want.abs().max()
            limit = 2e-2 if case.dtype == torch.bfloat16 else 3e-6
            assert error < limit, (case, name, error)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_mask_on_every_layout(ranks: RankPool, world_size: int) -> None:
    check(
        ranks,
        world_size,
        [Case(m, layout, S) for m in MASKS for layout in LAYOUTS for S in (48, 37)],
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_compiled(ranks: RankPool, world_size: int) -> None:
    check(
        ranks,
        world_size,
        [
            Case("causal", "contiguous", compile="aot_eager"),
            Case("causal", "zigzag", 37, compile="aot_eager"),
            Case("padding", "striped", 37, compile="aot_eager"),
            Case("causal", "contiguous", compile="inductor"),
            Case("causal", "zigzag", 37, compile="inductor"),
            Case("documents", "zigzag", 37, compile="inductor"),
        ],
    )
