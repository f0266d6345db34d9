"""The ring op on gloo ranks against the dense float64 reference."""

import pytest
import torch
from support.ranks import RankError, RankPool
from support.ring_cases import (
    NAMES,
    Case,
    check_cases,
    join,
    run_case,
    run_cases,
    run_inference,
)
from support.tolerances import assert_no_worse_than_one_rank
from torch import Tensor
from torch.distributed import ProcessGroup

from ringcompile.ir.mask import EmptyRow
from ringcompile.lowering.tiles import pieces

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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_mask_on_every_layout(ranks: RankPool, world_size: int) -> None:
    check_cases(
        ranks,
        world_size,
        [Case(m, layout, S) for m in MASKS for layout in LAYOUTS for S in (48, 37)],
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_without_a_key_give_what_the_user_wrote(
    ranks: RankPool, world_size: int
) -> None:
    masks = ("padding", "documents", "bidirectional padding")
    check_cases(
        ranks,
        world_size,
        [
            Case(m, layout, S, empty=empty)
            for empty in (EmptyRow.MEAN_ALL, EmptyRow.MEAN_FILLED)
            for m in masks
            for layout in LAYOUTS
            for S in (48, 37)
        ],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_rows_are_nan_and_only_they(ranks: RankPool, layout: str) -> None:
    case = Case("padding", layout, 37, empty=EmptyRow.NAN)
    results = ranks.run(run_cases, (case,), world_size=2)
    out = join(case, [r[0][0] for r in results]).double()
    assert torch.equal(out.isnan(), case.expected()[0].isnan())
    rest = ~out.isnan()
    torch.testing.assert_close(out[rest], case.expected()[0][rest], rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_heads_dtypes_and_stages(ranks: RankPool, world_size: int) -> None:
    check_cases(
        ranks,
        world_size,
        [
            Case("causal", heads=(4, 4, 16, 16)),
            Case("causal", "zigzag", heads=(4, 1, 16, 16)),
            Case("window", heads=(4, 1, 16, 8)),
            Case("causal", "zigzag", heads=(4, 2, 16, 8)),
            Case("causal", "zigzag", dtype=torch.bfloat16),
            Case("padding", "striped", 37, dtype=torch.bfloat16),
            Case("padding", dtype=torch.bfloat16, empty=EmptyRow.MEAN_ALL),
            Case("documents", "zigzag", 37, dtype=torch.float64),
            Case("causal", dtype=torch.float64),
            Case("causal", stages=1),
            Case("causal", stages=2),
            Case("window", "zigzag", stages=1),
            Case("causal", any_length=True),
            Case("causal", "zigzag", any_length=True),
            Case("padding", "striped", any_length=True),
        ],
    )


FROZEN = [
    (needs_q, needs_k, needs_v)
    for needs_q in (True, False)
    for needs_k in (True, False)
    for needs_v in (True, False)
    if needs_q or needs_k or needs_v
]


def test_frozen_inputs_have_no_gradient_and_cost_no_hang(ranks: RankPool) -> None:
    check_cases(ranks, 3, [Case("causal", needs_grad=n) for n in FROZEN])


@pytest.mark.parametrize("world_size", [2, 4])
def test_bfloat16_is_as_good_as_on_one_rank(ranks: RankPool, world_size: int) -> None:
    cases = tuple(
        Case(mask, layout, 128, (4, 2, 32, 32), torch.bfloat16)
        for mask, layout in (
            ("causal", "contiguous"),
            ("causal", "zigzag"),
            ("causal", "striped"),
            ("documents", "zigzag"),
        )
    )
    by_rank = ranks.run(run_cases, cases, world_size=world_size)
    (one_rank,) = ranks.run(run_cases, cases, world_size=1)
    for case, alone, *shards in zip(cases, one_rank, *by_rank, strict=True):
        for n, (name, want) in enumerate(zip(NAMES, case.expected(), strict=True)):
            got, base = join(case, [s[n] for s in shards]), join(case, [alone[n]])
            assert_no_worse_than_one_rank(got, base, want, f"{name} of {case}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patterns_are_data(ranks: RankPool, layout: str) -> None:
    check_cases(
        ranks,
        2,
        [
            Case(m, layout, S, heads)
            for m in ("longnet", "detached longnet", "local window", "global local")
            for S in (96, 83)
            for heads in ((4, 2, 8, 8), (4, 4, 8, 8))
        ],
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_along_a_curve(ranks: RankPool, world_size: int) -> None:
    check_cases(
        ranks,
        world_size,
        [
            Case("causal", "hilbert"),
            Case("window", "hilbert", 37),
            Case("padding", "hilbert", 37, empty=EmptyRow.MEAN_ALL),
            Case("documents", "hilbert", 37, segment=16, block_order="hilbert"),
            Case("documents", "hilbert", 37, segment=16, level=4),
            Case("longnet", "hilbert", 83, segment=48, stages=2),
            Case("longnet", "hilbert", 37, segment=24, compile="expanded"),
        ],
    )


def run_without_dense_kernels(
    group: ProcessGroup, rank: int, cases: tuple[Case, ...]
) -> list[tuple[Tensor | None, ...]]:
    """Any kernel without a mask is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dense kernel")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("attend", "attend_backward"):
            patch.setattr(pieces, name, refuse)
        return run_cases(group, rank, cases)


def test_plain_operators_compute_every_tile(ranks: RankPool) -> None:
    cases = tuple(
        Case(mask, layout, 37, kernel="math")
        for mask, layout in (
            ("causal", "zigzag"),
            ("all", "contiguous"),
            ("longnet", "striped"),
        )
    )
    by_rank = ranks.run(run_without_dense_kernels, cases, world_size=3)
    for case, *shards in zip(cases, *by_rank, strict=True):
        for n, want in enumerate(case.expected()):
            got = join(case, [s[n] for s in shards]).double()
            assert (got - want).abs().max() <= 3e-6 * want.abs().max()
    with pytest.raises(RankError, match="a dense kernel"):
        ranks.run(run_without_dense_kernels, (Case("causal"),))


def test_traced_by_aot_autograd(ranks: RankPool) -> None:
    check_cases(
        ranks,
        3,
        [
            Case("causal", compile="expanded"),
            Case("causal", "zigzag", 37, stages=2, compile="expanded"),
            Case("padding", "striped", 37, compile="expanded"),
            Case("padding", empty=EmptyRow.MEAN_ALL, compile="expanded"),
            Case("longnet", "zigzag", 37, compile="expanded"),
            Case("detached longnet", "zigzag", 37, compile="expanded"),
            # Which hops are needed differs; on every rank it must be the same ones.
            Case("causal", needs_grad=(True, False, False), compile="expanded"),
            Case("causal", needs_grad=(False, True, False), compile="expanded"),
            Case("causal", needs_grad=(False, False, True), compile="expanded"),
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("longnet", compile="inductor"),
        Case("documents", "zigzag", 37, compile="inductor"),
        Case("window", "hilbert", 37, block_order="hilbert", compile="inductor"),
    ],
)
def test_compiled_by_inductor(ranks: RankPool, case: Case) -> None:
    check_cases(ranks, 2, [case])


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_without_gradients(ranks: RankPool, compiler: str) -> None:
    case = Case("causal", needs_grad=(False, False, False), compile=compiler)
    results = ranks.run(run_inference, case, world_size=2)
    out, want = join(case, results), case.expected()[0]
    assert (out.double() - want).abs().max() < 3e-6 * want.abs().max()


def attend_twice(
    group: ProcessGroup, rank: int, case: Case
) -> tuple[tuple[Tensor | None, ...], ...]:
    return run_case(group, rank, case), run_case(group, rank, case)


def test_two_runs_give_the_same_bits(ranks: RankPool) -> None:
    case = Case("causal", "zigzag", dtype=torch.bfloat16)
    for first, second in ranks.run(attend_twice, case, world_size=4):
        for x, y in zip(first, second, strict=True):
            assert x is not None
            assert y is not None
            assert torch.equal(x, y)


def attend_under(
    group: ProcessGroup, rank: int, case: Case
) -> tuple[Tensor | None, Tensor | None]:
    with torch.autocast("cpu", torch.bfloat16):
        out, dq, *_ = run_case(group, rank, case)
    return out, dq


def test_autocast_is_that_of_attention(ranks: RankPool) -> None:
    for out, dq in ranks.run(attend_under, Case("padding"), world_size=2):
        assert out is not None
        assert dq is not None
        assert out.dtype == torch.bfloat16
        assert dq.dtype == torch.float32
