"""A pattern on several ranks loses no more to bfloat16 than twice one rank's error."""

import pytest
import torch
from support.pattern_cases import ADAPTIVE, CASES
from support.pattern_runs import NAMES, Cell, run_cells
from support.ranks import RankPool
from support.tolerances import assert_no_worse_than_one_rank

from ringcompile.ir.layout import LAYOUTS

ALL = [*CASES, *ADAPTIVE]


def cell_of(number: int, *, is_causal: bool, kernel: str) -> Cell:
    """Each on another layout."""
    layout = LAYOUTS[(number + is_causal) % len(LAYOUTS)]
    low = torch.bfloat16
    return Cell(ALL[number], is_causal, layout, dtype=low, kernel=kernel)


def check(ranks: RankPool, cells: list[Cell], cp_size: int) -> None:
    """Of out, dq, dk and dv."""
    (alone,) = ranks.run(run_cells, tuple(cells), world_size=1)
    for by_rank in ranks.run(run_cells, tuple(cells), world_size=cp_size):
        for cell, got, one in zip(cells, by_rank, alone, strict=True):
            triples = zip(NAMES, got, one, cell.expected(), strict=True)
            for name, ours, one_rank, want in triples:
                what = f"{name} of {cell}"
                assert_no_worse_than_one_rank(ours, one_rank, want, what)


# math: one kernel for all tiles, so that rings and merges alone make the difference.
# auto: full tiles by the device's kernel, which itself rounds to bfloat16.
KERNELS = ("math", "auto")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_pattern_loses_no_more_to_bfloat16_than_on_one_rank(
    ranks: RankPool, kernel: str
) -> None:
    """A third of them, with one mask each."""
    numbers = range(0, len(ALL), 3)
    cells = [cell_of(n, is_causal=n % 2 == 0, kernel=kernel) for n in numbers]
    check(ranks, cells, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("number", range(len(ALL)), ids=ALL)
def test_every_pattern_loses_no_more_to_bfloat16(
    ranks: RankPool, number: int, cp_size: int, kernel: str
) -> None:
    masks = (True, False)
    check(ranks, [cell_of(number, is_causal=m, kernel=kernel) for m in masks], cp_size)
