"""Pictures of patterns and how dense they are, against counts over all pairs."""

from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from support.pattern_cases import CASES, PatternCase
from torch import Tensor

from ringcompile.errors import OptionError
from ringcompile.patterns import (
    AttentionSpec,
    BigBird,
    DilatedWindow,
    Fixed,
    GlobalLocal,
    LocalWindow,
    Longformer,
    LongNet,
    MaskPattern,
    Sinks,
    Strided,
    draw,
    picture,
    save_image,
)
from ringcompile.plan import kept

H, G, S = 4, 2, 43


def square(length: int, *, is_causal: bool = False) -> AttentionSpec:
    return AttentionSpec(1, 1, length, is_causal)


def test_a_window_with_global_blocks() -> None:
    assert_expected_inline(
        draw(GlobalLocal(1, 8, 4), square(24), cells=12),
        """\
############
############
######......
######......
########....
########....
##..######..
##..######..
##....######
##....######
##......####
##......####""",
    )


def test_longnet_counts() -> None:
    assert_expected_inline(
        draw(LongNet((4, 8, 16), (1, 2, 4)), square(16, is_causal=True)),
        """\
3...............
##..............
2#2.............
####............
2.#.3...........
....##..........
#.#.2#2.........
....####........
#...#...3.......
........##......
........2#2.....
........####....
#...#...2.#.3...
............##..
........#.#.2#2.
............####""",
    )


def test_sinks() -> None:
    assert_expected_inline(
        draw(Sinks(2, 4), square(16)),
        """\
#...............
##..............
###.............
####............
#####...........
######..........
##.####.........
##..####........
##...####.......
##....####......
##.....####.....
##......####....
##.......####...
##........####..
##.........####.
##..........####""",
    )


def test_the_heads_of_a_fixed_layout_differ() -> None:
    spec = AttentionSpec(2, 2, 64)
    heads = [draw(Fixed(4, 1, 2, block=4), spec, head=h).splitlines() for h in (0, 1)]
    rows = [f"{a[::4]}  {b[::4]}" for a, b in zip(*heads, strict=True)][::4]
    assert_expected_inline(
        "\n".join(rows),
        """\
####...#...#...#  ####..#...#...#.
####...#...#...#  ####..#...#...#.
####...#...#...#  ####..#...#...#.
####...#...#...#  ####..#...#...#.
...#####...#...#  ..#.####..#...#.
...#####...#...#  ..#.####..#...#.
...#####...#...#  ..#.####..#...#.
...#####...#...#  ..#.####..#...#.
...#...#####...#  ..#...#.####..#.
...#...#####...#  ..#...#.####..#.
...#...#####...#  ..#...#.####..#.
...#...#####...#  ..#...#.####..#.
...#...#...#####  ..#...#...#.####
...#...#...#####  ..#...#...#.####
...#...#...#####  ..#...#...#.####
...#...#...#####  ..#...#...#.####""",
    )


def draw_dense(counts: Tensor, size: int) -> str:
    lines = []
    for rows in counts.split(size):
        line = ""
        for cell in rows.split(size, dim=1):
            values = set(cell.flatten().tolist())
            if values == {0}:
                line += "."
            elif 0 in values:
                line += "/"
            else:
                line += "#" if values == {1} else str(max(values))
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("name", CASES)
def test_a_picture_shows_the_pairs_that_count(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    counts = case.counts(H, G, S)
    drawn = draw(case.pattern, AttentionSpec(H, G, S), head=1)
    assert drawn == draw_dense(counts[1], 1)
    monkeypatch.setattr(kept, "_BOX_PAIRS", 3 * S)  # several strips in a row of cells
    spec = AttentionSpec(H, G, S, is_causal=True)
    drawn = draw(case.pattern, spec, head=3, cells=11)
    assert drawn == draw_dense(case.count(H, G, S, is_causal=True)[3], 4)


MASKS = {n: c for n, c in CASES.items() if isinstance(c.pattern, MaskPattern)}


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_density_is_the_share_of_pairs(
    case: PatternCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_BOX_PAIRS", 60)
    assert isinstance(case.pattern, MaskPattern)
    counts = case.counts(2, 2, S).double()
    assert case.pattern.density(S, num_heads=2) == pytest.approx(float(counts.mean()))
    got = case.pattern.density(S, num_heads=2, is_causal=True)
    below = case.count(2, 2, S, is_causal=True).double().sum()
    assert got == pytest.approx(float(below) / (S * (S + 1)))


def test_long_sequences_are_counted_by_their_edges() -> None:
    length, block = 1 << 13, 64
    near = 3 * length // block - 2  # blocks at most one apart
    assert LocalWindow(128).density(length) == near * block**2 / length**2


WINDOWED: list[MaskPattern] = [
    LocalWindow(8, 4),
    GlobalLocal(1, 4, 4),
    BigBird(1, 1, 0, 4),
    Longformer(3, (2,), 4),
    Sinks(2, 3),
    DilatedWindow(3, 2),
]


@pytest.mark.parametrize("pattern", WINDOWED, ids=lambda p: type(p).__name__)
def test_the_window_nearest_to_a_density(
    pattern: MaskPattern, caplog: pytest.LogCaptureFixture
) -> None:
    length, is_causal = 18, isinstance(pattern, DilatedWindow)
    densities = [
        pattern.with_reach(n).density(length, is_causal=is_causal)
        for n in range(length)
    ]
    assert sorted(densities) == densities
    assert densities[-1] > densities[0]
    for asked in (0.01, 0.37, 1.0):
        found = pattern.with_density(length, asked, is_causal=is_causal)
        got = found.density(length, is_causal=is_causal)
        assert type(found) is type(pattern)
        nearest = min(abs(d - asked) for d in densities)
        assert abs(got - asked) == pytest.approx(nearest, abs=1e-12)
        assert f"{found}: density {got:.3g} over {length} tokens" in caplog.text


def test_a_pattern_without_a_window_is_refused() -> None:
    with pytest.raises(OptionError) as caught:
        Strided(4).with_density(S, 0.5)
    assert_expected_inline(
        str(caught.value),
        """\
Strided has no window
  at: Strided.with_density
  because: a density is met by widening a window
  instead: LocalWindow, GlobalLocal, BigBird, Longformer, Sinks or DilatedWindow; or set the numbers and ask density(length)""",
    )


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_no_such_density(density: float) -> None:
    with pytest.raises(OptionError, match=f"density={density}"):
        LocalWindow(64).with_density(S, density)


def test_an_image_has_a_shade_for_each_cell(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    case = CASES["longnet paper"]
    save_image(case.pattern, AttentionSpec(H, G, S), tmp_path / "a.png", head=1)
    pixels = torch.from_numpy(image.imread(tmp_path / "a.png"))[..., :3]
    size = 512 // S
    assert pixels.shape == (S * size, S * size, 3)
    cells = pixels[::size, ::size]
    assert torch.equal(cells.repeat_interleave(size, 0), pixels[:, ::size])
    counts, darkness = case.counts(H, G, S)[1], 3 - cells.sum(-1)
    for n in counts.unique().tolist():
        assert darkness[counts == n].unique().numel() == 1
        assert n == 0 or darkness[counts == n][0] > darkness[counts == n - 1][0]


def test_what_a_picture_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="head=2 of num_heads=2"):
        draw(Strided(4), AttentionSpec(2, 1, S), head=2)
    with pytest.raises(OptionError, match="cells=0"):
        draw(Strided(4), square(S), cells=0)
    monkeypatch.setattr(picture, "find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"pip install 'ringcompile\[report\]'"):
        save_image(Strided(4), square(S), tmp_path / "a.png")
