import pytest
import sympy
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import captures, layouts, masks, positions

from ringcompile.ir.layout import LAYOUTS, Layout
from ringcompile.ir.mask import (
    K,
    Mask,
    Q,
    at_least_zero,
    causal,
    chunked,
    documents,
    evaluate,
    prefix,
    window,
)
from ringcompile.ir.schedule import Coverage, Kernel, Tile
from ringcompile.plan.coverage import DependsOnLength
from ringcompile.plan.tiles import build_tile

CAUSAL = Mask(causal())
HEADS = 3


def format_tile(tile: Tile) -> str:
    pieces = ", ".join(f"{p.kernel.value} {p.q} x {p.kv}" for p in tile.pieces)
    return f"{tile.coverage.value} {pieces or '-'} needs {tile.needs}"


def draw(mask: Mask, layout: Layout, length: int | None = None) -> str:
    """All tiles of a layout, one line each."""
    return "\n".join(
        f"q{q} kv{kv} {format_tile(build_tile(mask, layout, q, kv, length))}"
        for q in range(layout.cp_size)
        for kv in range(layout.cp_size)
    )


def computed(
    mask: Mask, layout: Layout, length: int, planned: int | None
) -> torch.Tensor:
    """How often each pair is computed, ``(B, H, S, S)``, by what the pieces say."""
    chunk = layout.chunk_size(length)
    want = evaluate(mask.keeps, positions(2, HEADS, length), captures(2, length))
    want = want.expand(2, HEADS, length, length).int()
    times = torch.zeros_like(want)
    for q_rank in range(layout.cp_size):
        for kv_rank in range(layout.cp_size):
            tile = build_tile(mask, layout, q_rank, kv_rank, planned)
            for piece in tile.pieces:
                assert tile.needs is not None
                first, end = tile.needs.resolve(chunk)
                start, stop = piece.kv.resolve(chunk)
                assert first <= start < stop <= end
                q = torch.tensor(
                    layout.positions(q_rank, length)[slice(*piece.q.resolve(chunk))]
                )
                k = torch.tensor(layout.positions(kv_rank, length)[start:stop])
                at = (..., q[:, None], k)
                if piece.kernel is Kernel.MASKED:
                    times[at] += want[at]
                elif piece.kernel is Kernel.FULL:
                    times[at] += 1
                else:
                    assert len(q) == len(k)
                    times[at] += torch.ones(len(q), len(k), dtype=torch.int32).tril()
    return times - want


@settings(deadline=None, max_examples=60)
@given(masks, layouts(16), st.integers(1, 40))
def test_each_kept_pair_is_computed_once(
    mask: Mask, layout: Layout, length: int
) -> None:
    assert not computed(mask, layout, length, length).any()


@settings(deadline=None, max_examples=30)
@given(masks, layouts(5), st.integers(2, 6))
def test_so_it_is_by_tiles_for_any_length(
    mask: Mask, layout: Layout, chunk: int
) -> None:
    length = chunk * layout.num_chunks
    try:
        wrong = computed(mask, layout, length, None)
    except DependsOnLength:
        return
    assert not wrong.any()


def test_zigzag_causal_tiles() -> None:
    assert_expected_inline(
        draw(CAUSAL, Layout("zigzag", 2)),
        """\
q0 kv0 / causal 0:2c x 0:2c needs 0:2c
q0 kv1 / full c:2c x 0:2c needs 0:2c
q1 kv0 / full 0:2c x 0:c needs 0:c
q1 kv1 / causal 0:2c x 0:2c needs 0:2c""",
    )


def test_striped_causal_tiles() -> None:
    assert_expected_inline(
        draw(CAUSAL, Layout("striped", 2)),
        """\
q0 kv0 / causal 0:c x 0:c needs 0:c
q0 kv1 / causal 1:c x 0:c-1 needs 0:c-1
q1 kv0 / causal 0:c x 0:c needs 0:c
q1 kv1 / causal 0:c x 0:c needs 0:c""",
    )


def test_a_window_is_a_halo_of_its_neighbour() -> None:
    mask = CAUSAL & window(3)
    assert_expected_inline(
        draw(mask, Layout("contiguous", 3), 24),
        """\
q0 kv0 / masked 0:c x 0:c needs 0:c
q0 kv1 . - needs None
q0 kv2 . - needs None
q1 kv0 / masked 0:3 x 5:c needs 5:c
q1 kv1 / masked 0:c x 0:c needs 0:c
q1 kv2 . - needs None
q2 kv0 . - needs None
q2 kv1 / masked 0:3 x 5:c needs 5:c
q2 kv2 / masked 0:c x 0:c needs 0:c""",
    )


def test_a_halo_grows_with_the_window_not_the_length() -> None:
    for length in (1_000, 1_000_000):
        tile = build_tile(CAUSAL & window(127), Layout("contiguous", 4), 2, 1, length)
        assert tile.needs is not None
        start, stop = tile.needs.resolve(length // 4)
        assert stop - start == 127


def test_padding_is_cut_off() -> None:
    assert_expected_inline(
        draw(Mask(), Layout("zigzag", 2), 9),
        """\
q0 kv0 # full 0:c x 0:c needs 0:c
q0 kv1 # full 0:c x 0:2c needs 0:2c
q1 kv0 # full 0:2c x 0:c needs 0:c
q1 kv1 # full 0:2c x 0:2c needs 0:2c""",
    )


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("length", [None, 64, 61, 57])
def test_causal_attention_needs_no_mask(name: str, length: int | None) -> None:
    layout = Layout(name, 4)
    for q in range(4):
        for kv in range(4):
            kernels = {
                p.kernel for p in build_tile(CAUSAL, layout, q, kv, length).pieces
            }
            assert Kernel.MASKED not in kernels


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_own_causal_tile_is_one_square(name: str) -> None:
    for length in (None, 40, 37):
        tile = build_tile(CAUSAL, Layout(name, 4), 1, 1, length)
        assert [p.kernel for p in tile.pieces] == [Kernel.CAUSAL]


def test_bidirectional_attention_is_one_full_piece() -> None:
    tile = build_tile(Mask(), Layout("zigzag", 4), 3, 1, None)
    assert tile.coverage is Coverage.FULL
    assert format_tile(tile) == "# full 0:2c x 0:2c needs 0:2c"


def test_a_strict_triangle_is_shifted_rows() -> None:
    strict = Mask(at_least_zero(Q - K - 3))
    tile = build_tile(strict, Layout("contiguous", 2), 0, 0, 20)
    assert format_tile(tile) == "/ causal 3:c x 0:7 needs 0:7"


def test_documents_leave_what_lies_above_the_diagonal() -> None:
    mask = Mask(causal(), 1) & documents(0)
    tile = build_tile(mask, Layout("zigzag", 2), 0, 1, None)
    assert format_tile(tile) == "/ masked c:2c x 0:2c needs 0:2c"


def test_a_shard_of_padding_has_no_work() -> None:
    layout = Layout("contiguous", 4)
    assert layout.positions(3, 5) == (6, 7)
    for other in range(4):
        assert build_tile(Mask(), layout, 3, other, 5).coverage is Coverage.EMPTY
        assert build_tile(Mask(), layout, other, 3, 5).coverage is Coverage.EMPTY


@pytest.mark.parametrize("keeps", [window(4, 0), chunked(4), prefix(4)])
def test_tiles_that_depend_on_the_length_say_so(keeps: sympy.Basic) -> None:
    with pytest.raises(DependsOnLength):
        build_tile(Mask(keeps), Layout("contiguous", 4), 1, 0, None)
