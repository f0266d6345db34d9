"""The Hilbert curve: an order of tokens, and of the blocks of a tile (section 4).

The square of side ``2^n`` is walked by the standard ``d2xy``: cell ``(x, y)`` of number
``y * 2^n + x``. Invariant: each cell that is asked for comes exactly once, and all that
lie outside are passed over without being looked at one by one.
"""

from collections.abc import Iterator
from functools import lru_cache

from ringcompile.errors import OptionError

# Quarters of a square in the order of the curve: where, and whether the curve in it is
# mirrored on the diagonal and turned by half a turn.
_QUARTERS = (
    (0, 0, True, False),
    (0, 1, False, False),
    (1, 1, False, False),
    (1, 0, True, True),
)


def walk_curve(
    level: int, num_rows: int, num_columns: int
) -> Iterator[tuple[int, int]]:
    """Walk the cells of a rectangle as the curve over ``2^level`` x ``2^level`` does.

    Args:
        level: n.
        num_rows: cells with ``y < num_rows`` count.
        num_columns: cells with ``x < num_columns`` count.

    Yields:
        ``(x, y)``.
    """
    squares = [(1 << level, 0, 0, False, False)]
    while squares:
        side, x, y, mirrored, turned = squares.pop()
        if x >= num_columns or y >= num_rows:
            continue
        if side == 1:
            yield x, y
            continue
        half = side // 2
        for right, down, mirrors, turns in reversed(_QUARTERS):
            column, row = (down, right) if mirrored else (right, down)
            squares.append(
                (
                    half,
                    x + half * (column ^ turned),
                    y + half * (row ^ turned),
                    mirrored ^ mirrors,
                    turned ^ turns,
                )
            )


@lru_cache(maxsize=16)
def order_tokens(num_tokens: int, level: int | None = None) -> tuple[int, ...]:
    """Positions ``0 .. num_tokens - 1`` along a curve that holds them all.

    Args:
        num_tokens: L.
        level: n of the curve over ``4^n`` cells; None: the least that holds L.

    Raises:
        OptionError: ``4^level < num_tokens``.
    """
    least = 0
    while 4**least < num_tokens:
        least += 1
    level = least if level is None else level
    if level < least:
        raise OptionError(
            f"hilbert_level={level} for {num_tokens} tokens",
            at="options",
            because=f"a curve of that level goes through {4**level} cells",
            instead=f"hilbert_level={least} or more, or leave it out for {least}",
        )
    num_rows = -(-num_tokens // (1 << level))
    cells = walk_curve(level, num_rows, 1 << level)
    return tuple(p for x, y in cells if (p := (y << level) + x) < num_tokens)


@lru_cache(maxsize=256)
def order_blocks(num_rows: int, num_columns: int) -> tuple[tuple[int, int], ...]:
    """The blocks ``(i, j)`` of a tile's grid along the least curve that holds it.

    Args:
        num_rows: blocks of queries.
        num_columns: blocks of keys.
    """
    level = (max(num_rows, num_columns, 1) - 1).bit_length()
    return tuple((y, x) for x, y in walk_curve(level, num_rows, num_columns))
