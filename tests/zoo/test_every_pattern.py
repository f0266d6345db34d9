"""Every pattern by option on an attention, forward and backward, on gloo ranks."""

import pytest
from support.pattern_cases import CASES
from support.pattern_runs import Cell, check_errors, run_cells
from support.ranks import RankPool

LAYOUTS = ("contiguous", "zigzag", "striped")
HEADS = ((4, 2), (4, 4), (5, 1))
SWEEP = [
    Cell(name, is_causal, layout, heads)
    for name in CASES
    for is_causal in (True, False)
    for layout in LAYOUTS
    for heads in HEADS
]


def check(ranks: RankPool, cells: list[Cell], cp_size: int) -> None:
    """Require out, dq, dk and dv within 1e-5 of their largest value."""
    for by_rank in ranks.run(run_cells, tuple(cells), world_size=cp_size):
        for cell, got in zip(cells, by_rank, strict=True):
            check_errors(cell, got)


@pytest.mark.parametrize("cp_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_pattern_runs_sharded(ranks: RankPool, cp_size: int) -> None:
    """One cell of each pattern; which one changes from pattern to pattern."""
    step = len(SWEEP) // len(CASES)
    cells = [SWEEP[n * step + (5 * n + cp_size) % step] for n in range(len(CASES))]
    check(ranks, cells, cp_size)


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_pattern_runs_sharded_everywhere(
    ranks: RankPool, name: str, cp_size: int
) -> None:
    check(ranks, [cell for cell in SWEEP if cell.name == name], cp_size)
