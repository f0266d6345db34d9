import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import layouts

from ringcompile.errors import OptionError
from ringcompile.ir.layout import LAYOUTS, Layout


@settings(deadline=None, max_examples=60)
@given(layouts(16), st.integers(1, 100))
def test_a_layout_is_a_permutation_with_its_inverse(
    layout: Layout, length: int
) -> None:
    order = layout.permutation(length)
    assert sorted(order) == list(range(layout.shard_size(length) * layout.cp_size))
    assert [order[row] for row in layout.inverse(length)] == list(range(len(order)))


@settings(deadline=None, max_examples=60)
@given(layouts(16), st.integers(1, 100))
def test_position_tensors_agree(layout: Layout, length: int) -> None:
    for rank in range(layout.cp_size):
        chunk = layout.chunk_size(length)
        at = layout.position_tensor(rank, chunk, length=length)
        assert at.dtype == torch.int64
        assert tuple(at.tolist()) == layout.positions(rank, length)


@settings(deadline=None, max_examples=60)
@given(layouts(16), st.integers(1, 100))
def test_padding_is_less_than_a_row_of_chunks(layout: Layout, length: int) -> None:
    padding = layout.shard_size(length) * layout.cp_size - length
    assert 0 <= padding < layout.num_chunks


def test_positions_of_seven_tokens_on_two_ranks() -> None:
    lines = [
        f"{layout}: " + " | ".join(str(layout.positions(r, 7)) for r in range(2))
        for layout in (*(Layout(name, 2) for name in LAYOUTS), Layout("hilbert", 2, 4))
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
contiguous x2: (0, 1, 2, 3) | (4, 5, 6, 7)
zigzag x2: (0, 1, 6, 7) | (2, 3, 4, 5)
striped x2: (0, 2, 4, 6) | (1, 3, 5, 7)
hilbert x2: (0, 1, 5, 4) | (6, 2, 3, 7)
hilbert/4 x2: (0, 2, 3, 1) | (4, 6, 5, 7)""",
    )


def test_a_curve_goes_through_each_segment_in_turn() -> None:
    """SEMANTICS.md 4a; the last segment has three tokens, and the pad comes last."""
    curve = (0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3)
    assert Layout("hilbert", 4).permutation(16) == curve
    assert Layout("hilbert", 1).permutation(4) == (0, 2, 3, 1)
    order = (*curve, *(16 + p for p in curve), 32, 34, 33, 35)
    assert Layout("hilbert", 4, 16).permutation(35) == order


def test_a_curve_of_a_higher_level_is_another_order() -> None:
    """Position ``y * 2^n + x``, those past the end left out (SEMANTICS.md 4)."""
    assert Layout("hilbert", 1, level=1).permutation(4) == (0, 2, 3, 1)
    assert Layout("hilbert", 1, level=2).permutation(4) == (0, 1, 2, 3)
    deeper = Layout("hilbert", 2, 5, level=3)
    assert sorted(deeper.permutation(13)) == list(range(14))
    with pytest.raises(OptionError, match=r"hilbert_level=1 for 5 tokens") as caught:
        Layout("hilbert", 1, level=1).permutation(5)
    assert "hilbert_level=2 or more" in str(caught.value)
    with pytest.raises(OptionError, match="only hilbert goes along a curve"):
        Layout("zigzag", 2, level=2)


def test_only_a_curve_has_segments() -> None:
    for layout in (
        Layout("hilbert", 3, 24),
        Layout("hilbert", 3, 24, 5),
        Layout("hilbert", 3, None, 5),
        Layout("zigzag", 3),
    ):
        assert Layout.parse(layout.key, 3) == layout
    with pytest.raises(OptionError, match="only hilbert has segments"):
        Layout("zigzag", 2, 4)
    with pytest.raises(OptionError, match="of one token or more"):
        Layout("hilbert", 2, 0)


def test_an_unknown_layout_names_those_that_are() -> None:
    with pytest.raises(
        OptionError, match="one of contiguous, zigzag, striped, hilbert"
    ):
        Layout("spiral", 2)
