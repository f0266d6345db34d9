"""The refusal suite: each trap is right, or a clear error on every rank; never a hang."""

from collections.abc import Callable

import pytest
import torch
from support import (
    trap_effects,
    trap_empty,
    trap_gradients,
    trap_masks,
    trap_shapes,
    trap_values,
)
from support.ranks import RankError, RankHangError, RankPool
from support.sampling import one_in
from support.traps import Run, Trap, run_differing, run_trap

HANG_S = 120.0
HALF_RTOL = 3e-2  # bfloat16 and float16, each against eager in the same
STRICT = Run()

ON_TWO = (
    *trap_values.TRAPS,
    *trap_shapes.TRAPS,
    *trap_effects.TRAPS,
    *trap_gradients.TRAPS,
    *trap_empty.TRAPS,
)
KEPT = tuple(trap_masks.KEPT)
ADDED = tuple(trap_masks.ADDED)


def check_trap(
    ranks: RankPool, trap: Trap, run: Run = STRICT, *, cp_size: int = 2
) -> None:
    verdicts = ranks.run(run_trap, trap, run, world_size=cp_size, timeout_s=HANG_S)
    assert all(v == "right" or v.startswith("told: ") for v in verdicts), verdicts
    assert len({v == "right" for v in verdicts}) == 1, verdicts


def _name(trap: Callable[..., object]) -> str:
    return trap.__name__


@pytest.mark.parametrize("trap", one_in(3, ON_TWO), ids=_name)
def test_a_trap_is_right_or_told(ranks: RankPool, trap: Trap) -> None:
    check_trap(ranks, trap)


@pytest.mark.parametrize(
    "trap", [trap_shapes.fewer_tokens_than_ranks, trap_shapes.one_token], ids=_name
)
def test_a_short_sequence_on_four_ranks(ranks: RankPool, trap: Trap) -> None:
    check_trap(ranks, trap, cp_size=4)


@pytest.mark.parametrize("trap", trap_effects.LOW_PRECISION, ids=_name)
def test_autocast_is_right_or_told(ranks: RankPool, trap: Trap) -> None:
    check_trap(ranks, trap, Run(HALF_RTOL, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_on_cpu(ranks: RankPool, dtype: torch.dtype) -> None:
    rtol = STRICT.rtol if dtype == torch.float64 else HALF_RTOL
    check_trap(ranks, trap_effects.residual_in_place, Run(rtol, dtype))


@pytest.mark.parametrize("name", one_in(3, KEPT))
def test_a_mask_that_is_easy_to_misread(ranks: RankPool, name: str) -> None:
    check_trap(ranks, trap_masks.SdpaKept(name))


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_to_scores(ranks: RankPool, name: str) -> None:
    check_trap(ranks, trap_masks.Added(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_the_same_mask_spelled_out(ranks: RankPool, name: str) -> None:
    check_trap(ranks, trap_masks.FilledKept(name))


@pytest.mark.slow
@pytest.mark.parametrize("trap", ON_TWO, ids=_name)
def test_a_trap_where_errors_are_wanted(ranks: RankPool, trap: Trap) -> None:
    check_trap(ranks, trap, Run(unsupported="error"))


@pytest.mark.parametrize("trap", one_in(3, trap_gradients.DIFFERENT_RANKS), ids=_name)
def test_ranks_that_differ_are_told(ranks: RankPool, trap: Trap) -> None:
    with pytest.raises(RankError) as caught:  # so that the pool makes groups anew
        ranks.run(run_differing, trap, timeout_s=HANG_S)
    assert not isinstance(caught.value, RankHangError)
    text = str(caught.value)
    assert "told: " in text
    assert "unclear: " not in text
