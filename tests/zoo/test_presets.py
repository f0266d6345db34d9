"""Every preset by options on an attention, forward and backward, on gloo ranks."""

import pytest
from support.pattern_runs import Cell, check_errors, run_cells
from support.preset_cases import EXACT, PRESETS
from support.ranks import RankPool

from ringcompile.ir.layout import LAYOUTS
from ringcompile.preset import presets

OWN_OPTIONS = ("layout", "kernel", "block_order")


def cell_of(name: str, is_causal: bool, layout: str = "auto") -> Cell:
    return Cell(name, is_causal, layout, PRESETS[name].heads)


def check(ranks: RankPool, cells: list[Cell], cp_size: int) -> None:
    """Require out, dq, dk and dv within 1e-5 of their largest value."""
    for by_rank in ranks.run(run_cells, tuple(cells), world_size=cp_size):
        for cell, got in zip(cells, by_rank, strict=True):
            check_errors(cell, got)


def test_every_preset_has_a_case() -> None:
    assert list(presets()) == list(dict.fromkeys(c.preset for c in PRESETS.values()))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_made_of_the_pattern_and_options_that_it_means(name: str) -> None:
    case = PRESETS[name]
    options = case.options()
    expected = "exact" if case.meaning is EXACT else case.meaning.pattern
    assert options["attention"] == expected
    assert {k: v for k, v in options.items() if k in OWN_OPTIONS} == case.own


def test_a_preset_computes_what_it_means(ranks: RankPool) -> None:
    """One mask of each."""
    cells = [cell_of(name, n % 2 == 0) for n, name in enumerate(PRESETS)]
    check(ranks, cells, 2)


def test_chosen_blocks_may_lie_along_a_curve(ranks: RankPool) -> None:
    check(ranks, [cell_of("block_sparse, adaptive", True, "hilbert")], 2)


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_preset_means_the_same_in_any_layout(
    ranks: RankPool, layout: str, cp_size: int
) -> None:
    free = [n for n, case in PRESETS.items() if "layout" not in case.own]
    free.remove("block_sparse, adaptive")  # above
    check(ranks, [cell_of(n, len(n) % 2 == 0, layout) for n in free], cp_size)


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_computes_what_it_means_everywhere(
    ranks: RankPool, name: str, cp_size: int
) -> None:
    check(ranks, [cell_of(name, is_causal) for is_causal in (True, False)], cp_size)
