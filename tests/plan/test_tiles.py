import pytest
import sympy
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import captures, layouts, masks, positions

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import LAYOUTS, Layout
from ringcompile.ir.mask import (
    K,
    Mask,
    Q,
    at_least_zero,
    causal,
    chunked,
    disjunction,
    documents,
    equals_zero,
    prefix,
    window,
)
from ringcompile.ir.schedule import Coverage, Kernel, Tile, format_runs
from ringcompile.plan.coverage import DependsOnLength
from ringcompile.plan.tiles import build_tile

CAUSAL = Mask(causal())
HEADS = 3
FOR_ANY_LENGTH = [name for name in LAYOUTS if Layout(name, 1).has_runs]


def format_tile(tile: Tile) -> str:
    pieces = ", ".join(f"{p.kernel.value} {p.q} x {p.kv}" for p in tile.pieces)
    return f"{tile.coverage.value} {pieces or '-'} needs {format_runs(tile.needs)}"


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
                start, stop = piece.kv.resolve(chunk)
                runs = [run.resolve(chunk) for run in tile.needs]
                assert any(a <= start < stop <= b for a, b in runs)
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
q0 kv1 . - needs none
q0 kv2 . - needs none
q1 kv0 / masked 0:3 x 5:c needs 5:c
q1 kv1 / masked 0:c x 0:c needs 0:c
q1 kv2 . - needs none
q2 kv0 . - needs none
q2 kv1 / masked 0:3 x 5:c needs 5:c
q2 kv2 / masked 0:c x 0:c needs 0:c""",
    )


def test_a_halo_grows_with_the_window_not_the_length() -> None:
    for length in (1_000, 1_000_000):
        tile = build_tile(CAUSAL & window(127), Layout("contiguous", 4), 2, 1, length)
        (halo,) = tile.needs
        start, stop = halo.resolve(length // 4)
        assert stop - start == 127


def test_only_blocks_that_somebody_sees_are_needed() -> None:
    """Blocks of 64: the first one, and neighbours."""
    i, j = sympy.floor(Q / 64), sympy.floor(K / 64)
    near = at_least_zero(1 - i + j) & at_least_zero(1 - j + i)
    mask = Mask(disjunction(near, equals_zero(j)))
    assert_expected_inline(
        draw(mask, Layout("contiguous", 3), 3 * 256),
        """\
q0 kv0 / masked 0:c x 0:c needs 0:c
q0 kv1 / masked 192:c x 0:64 needs 0:64
q0 kv2 . - needs none
q1 kv0 / masked 0:c x 0:64, masked 0:c x 192:c needs 0:64,192:c
q1 kv1 / masked 0:c x 0:c needs 0:c
q1 kv2 / masked 192:c x 0:64 needs 0:64
q2 kv0 / masked 0:c x 0:64 needs 0:64
q2 kv1 / masked 0:64 x 192:c needs 192:c
q2 kv2 / masked 0:c x 0:c needs 0:c""",
    )


def test_padding_is_cut_off() -> None:
    assert_expected_inline(
        draw(Mask(), Layout("zigzag", 2), 9),
        """\
q0 kv0 # full 0:c x 0:c needs 0:c
q0 kv1 # full 0:c x 0:2c needs 0:2c
q1 kv0 # full 0:2c x 0:c needs 0:c
q1 kv1 # full 0:2c x 0:2c needs 0:2c""",
    )


@pytest.mark.parametrize("name", FOR_ANY_LENGTH)
@pytest.mark.parametrize("length", [None, 64, 61, 57])
def test_causal_attention_needs_no_mask(name: str, length: int | None) -> None:
    layout = Layout(name, 4)
    for q in range(4):
        for kv in range(4):
            kernels = {
                p.kernel for p in build_tile(CAUSAL, layout, q, kv, length).pieces
            }
            assert Kernel.MASKED not in kernels


@pytest.mark.parametrize("name", FOR_ANY_LENGTH)
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


def test_a_curve_over_a_power_of_four() -> None:
    """Four ranks hold the quarters of a square: two of early tokens, two of late."""
    tiles = [
        [build_tile(CAUSAL, Layout("hilbert", 4), q, kv, 256) for kv in range(4)]
        for q in range(4)
    ]
    assert ["".join(t.coverage.value for t in row) for row in tiles] == [
        "/../",
        "#//#",
        "#//#",
        "/../",
    ]
    assert format_tile(tiles[1][0]) == "# full 0:c x 0:c needs 0:c"


def test_of_a_curve_only_rows_near_the_window_are_needed() -> None:
    """S = 64 x 64; rank 0 holds the positions whose row and column are below 32."""
    layout, mask = Layout("hilbert", 4), CAUSAL & window(63)
    tile = build_tile(mask, layout, 1, 0, 4_096)
    needed = [run.resolve(1_024) for run in tile.needs]
    assert sum(b - a for a, b in needed) < 1_024 / 4
    rows = layout.positions(0, 4_096)
    needs = {p for a, b in needed for p in rows[a:b]}
    reads = {k for q in layout.positions(1, 4_096) for k in range(q - 63, q + 1)}
    assert set(rows) & reads <= needs


def test_a_segment_within_a_shard_costs_no_hop() -> None:
    layout = Layout("hilbert", 3, 16)
    for q in range(3):
        for kv in range(3):
            tile = build_tile(CAUSAL & chunked(16), layout, q, kv, 96)
            assert (tile.coverage is Coverage.EMPTY) == (q != kv)


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


def test_a_curve_depends_on_the_length() -> None:
    with pytest.raises(DependsOnLength, match="hilbert order"):
        build_tile(CAUSAL, Layout("hilbert", 2), 0, 0, None)


@pytest.mark.parametrize("keeps", [window(4, 0), chunked(4), prefix(4)])
def test_tiles_that_depend_on_the_length_say_so(keeps: sympy.Basic) -> None:
    with pytest.raises(DependsOnLength):
        build_tile(Mask(keeps), Layout("contiguous", 4), 1, 0, None)
