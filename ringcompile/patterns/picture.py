"""A pattern as a picture: text of one character for a cell of pairs, or an image.

Invariant: a cell is drawn from all of its pairs, whatever the pattern's class.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ringcompile.errors import OptionError
from ringcompile.ir.mask import Mask, causal
from ringcompile.ir.schedule import Selection
from ringcompile.patterns.base import AttentionSpec, Pattern
from ringcompile.plan.kept import read_grid

CELLS = 64
IMAGE_CELLS = 512
_DIGITS = 9


def draw(
    pattern: Pattern, spec: AttentionSpec, *, head: int = 0, cells: int = CELLS
) -> str:
    """Draw which keys the queries of one head see: queries down, keys to the right.

    ``.`` is a cell in which no pair counts, ``/`` one in which some do, ``#`` one in
    which all do. A digit: all do, and some that many times, since several parts of a
    dilated pattern reach them (``+``: more than 9 times).

    Args:
        pattern: any pattern.
        spec: the attention, over ``length`` tokens; drawn with a causal mask if
            ``is_causal``, else without one.
        head: the query head.
        cells: at most so many characters a line, and so many lines.

    Returns:
        Lines without trailing newline.

    Raises:
        OptionError: there is no such head, or no cell to draw.
    """
    return draw_parts(_build(pattern, spec, head), spec, head=head, cells=cells)


def draw_parts(
    parts: Sequence[tuple[Mask, Selection | None]],
    spec: AttentionSpec,
    *,
    head: int = 0,
    cells: int = CELLS,
) -> str:
    """Draw the pairs of parts, as ``draw`` does; their masks have no captures."""
    _require_cells(cells)
    grid = read_grid(parts, int(spec.length), cells=cells, head=head)
    rows = zip(grid.least.tolist(), grid.most.tolist(), strict=True)
    return "\n".join("".join(map(_character, *row)) for row in rows)


def _character(least: int, most: int) -> str:
    if least and most > 1:
        return str(most) if most <= _DIGITS else "+"
    if least:
        return "#"
    return "/" if most else "."


def save_image(
    pattern: Pattern,
    spec: AttentionSpec,
    path: str | Path,
    *,
    head: int = 0,
    cells: int = IMAGE_CELLS,
) -> None:
    """Write the picture as an image: the darker a cell, the more of its pairs count.

    Args:
        pattern: any pattern.
        spec: the attention, as for ``draw``.
        path: the file; its ending says which format, ``.png`` for one.
        head: the query head.
        cells: at most so many cells along an edge; one is as many pixels wide as makes
            the image about 512 wide.

    Raises:
        OptionError: matplotlib is missing, or there is no such head, or no cell.
    """
    if find_spec("matplotlib") is None:
        raise OptionError(
            "save_image without matplotlib",
            at="ringcompile.patterns",
            because="it writes the file",
            instead="pip install 'ringcompile[report]', or draw(...) for text",
        )
    from matplotlib.image import imsave  # noqa: PLC0415 - optional

    _require_cells(cells)
    parts = _build(pattern, spec, head)
    mean = read_grid(parts, int(spec.length), cells=cells, head=head).mean
    scale = max(1, IMAGE_CELLS // len(mean))
    pixels = mean.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    most = max(1.0, float(mean.max()))
    imsave(path, pixels.numpy(), cmap="Blues", vmin=0.0, vmax=most)


def _build(
    pattern: Pattern, spec: AttentionSpec, head: int
) -> Sequence[tuple[Mask, Selection | None]]:
    if not 0 <= head < spec.num_heads:
        raise OptionError(
            f"head={head} of num_heads={spec.num_heads}",
            at="picture",
            because="heads are counted from 0",
            instead=f"head={spec.num_heads - 1} or less, or more heads",
        )
    mask = Mask(causal()) if spec.is_causal else Mask()
    return pattern.build_parts(mask, spec)


def _require_cells(cells: int) -> None:
    if cells < 1:
        raise OptionError(
            f"cells={cells}",
            at="picture",
            because="a picture has at least one cell",
            instead=f"leave it out for {CELLS}",
        )
