"""Every pattern on every layout, all ranks in one process, against its dense meaning."""

import pytest
from support.pattern_cases import CASES, check_simulated

from ringcompile.ir.layout import LAYOUTS, Layout
from ringcompile.patterns import LocalWindow, LongNet, Pattern
from ringcompile.patterns.base import find_segment

HEADS = [(4, 2), (5, 5), (5, 1)]


def layouts_of(pattern: Pattern) -> list[Layout]:
    """Every layout on 1 to 4 ranks; 43 tokens need pads on all but one."""
    segment = find_segment(pattern)
    return [
        Layout(name, cp_size, segment if name == "hilbert" else None)
        for cp_size in (1, 2, 3, 4)
        for name in LAYOUTS
    ]


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_a_pattern_means_what_semantics_says(number: int) -> None:
    """Of each pattern two cells of the sweep below; another pattern, other cells."""
    case = list(CASES.values())[number]
    layouts = layouts_of(case.pattern)
    for is_causal in (False, True):
        layout = layouts[(5 * number + 7 * is_causal + 3) % len(layouts)]
        heads = HEADS[(number + is_causal) % len(HEADS)]
        check_simulated(case, layout, heads, is_causal=is_causal)


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("name", CASES)
def test_a_pattern_means_it_everywhere(name: str, *, is_causal: bool) -> None:
    case = CASES[name]
    for layout in layouts_of(case.pattern):
        for heads in HEADS:
            check_simulated(case, layout, heads, is_causal=is_causal)


def test_segments_of_a_pattern_are_those_of_its_dilation() -> None:
    longnet = LongNet((8, 24, 16), (1, 2, 4))
    assert find_segment(longnet) == 24
    assert find_segment(LocalWindow(16, 4) & longnet) == 24
    assert find_segment(LocalWindow(16, 4)) is None
    assert find_segment("exact") is None
