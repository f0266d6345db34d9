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
        at = layout.position_tensor(rank, layout.chunk_size(length))
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
        for layout in (Layout(name, 2) for name in LAYOUTS)
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
contiguous x2: (0, 1, 2, 3) | (4, 5, 6, 7)
zigzag x2: (0, 1, 6, 7) | (2, 3, 4, 5)
striped x2: (0, 2, 4, 6) | (1, 3, 5, 7)""",
    )


def test_an_unknown_layout_names_those_that_are() -> None:
    with pytest.raises(OptionError, match="one of contiguous, zigzag, striped"):
        Layout("spiral", 2)
