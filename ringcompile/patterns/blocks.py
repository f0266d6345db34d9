"""Block-sparse layouts: which blocks of queries see which blocks of keys.

Every layout takes ``block``, tokens in a block; parameters that end in ``_blocks``
count blocks, ``window`` counts tokens (SEMANTICS.md section 3). Causality is the user's
mask.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Self

import sympy
from sympy.logic.boolalg import Boolean

from ringcompile.errors import OptionError
from ringcompile.ir.mask import (
    H,
    K,
    Q,
    at_least_zero,
    canonicalize,
    conjunction,
    disjunction,
    equals_zero,
)
from ringcompile.ir.tables import RandomBlocks, is_on
from ringcompile.ir.text import format_sexpr
from ringcompile.patterns.base import (
    AttentionSpec,
    MaskPattern,
    freeze,
    freeze_pairs,
    require_not_negative,
    require_positive,
)


def _blocks(block: int) -> tuple[sympy.Expr, sympy.Expr]:
    """The numbers of the query's and the key's block."""
    return sympy.floor(Q / block), sympy.floor(K / block)


def _near(block: int, reach: int) -> Boolean:
    """Blocks at most ``reach`` apart."""
    i, j = _blocks(block)
    return conjunction(at_least_zero(reach - i + j), at_least_zero(reach + i - j))


def _in_range(x: sympy.Expr, start: int, stop: int) -> Boolean:
    return conjunction(at_least_zero(x - start), at_least_zero(stop - 1 - x))


def _in_ranges(x: sympy.Expr, ranges: Iterable[Sequence[int]]) -> Boolean:
    return disjunction(*(_in_range(x, start, stop) for start, stop in ranges))


@dataclass(frozen=True, slots=True)
class LocalWindow(MaskPattern):
    """Blocks at most half a window apart.

    Attributes:
        window: tokens that the window is wide, both sides together.
        block: tokens in a block.
    """

    window: int
    block: int = 64

    def __post_init__(self) -> None:
        require_positive("LocalWindow", window=self.window, block=self.block)
        _require_window(self, self.window, self.block)

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """``abs(i - j) <= (window // b) // 2``."""
        del spec
        return _near(self.block, self.window // self.block // 2)

    def with_reach(self, reach: int) -> Self:
        """The same with a window of ``2 * reach`` blocks; one if that is none."""
        return replace(self, window=max(2 * reach, 1) * self.block)


@dataclass(frozen=True, slots=True)
class DilatedBlocks(MaskPattern):
    """The own block, and those some distances away.

    Attributes:
        rates: distances in blocks.
        block: tokens in a block.
    """

    rates: tuple[int, ...]
    block: int = 64

    def __post_init__(self) -> None:
        freeze(self, "rates")
        require_positive("DilatedBlocks", rates=self.rates, block=self.block)

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """``abs(i - j) in {0} or rates``."""
        del spec
        i, j = _blocks(self.block)
        distances = sorted({0, *self.rates, *(-r for r in self.rates)})
        return disjunction(*(equals_zero(i - j - d) for d in distances))


@dataclass(frozen=True, slots=True)
class GlobalLocal(MaskPattern):
    """A local window, and the first blocks that see and are seen by all.

    Attributes:
        global_blocks: how many.
        window: tokens that the window is wide, both sides together.
        block: tokens in a block.
    """

    global_blocks: int
    window: int
    block: int = 64

    def __post_init__(self) -> None:
        require_not_negative("GlobalLocal", global_blocks=self.global_blocks)
        require_positive("GlobalLocal", window=self.window, block=self.block)
        _require_window(self, self.window, self.block)

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """The window, or ``i < g``, or ``j < g``."""
        del spec
        near = _near(self.block, self.window // self.block // 2)
        return disjunction(near, *_first(self.global_blocks, self.block))

    def with_reach(self, reach: int) -> Self:
        """The same with a window of ``2 * reach`` blocks; one if that is none."""
        return replace(self, window=max(2 * reach, 1) * self.block)


def _first(count: int, block: int) -> tuple[Boolean, Boolean]:
    i, j = _blocks(block)
    return at_least_zero(count - 1 - i), at_least_zero(count - 1 - j)


@dataclass(frozen=True, slots=True)
class Fixed(MaskPattern):
    """Windows end to end; the last blocks of each are seen by all.

    Attributes:
        window_blocks: blocks L in a window.
        global_blocks: blocks g of each window that are global.
        num_patterns: n; head h takes the ``(1 + h mod n)``-th such blocks from the end.
        horizontal: whether global blocks also see all.
        block: tokens in a block.

    Source: Sparse Transformer, arXiv 1904.10509, as in DeepSpeed.
    """

    window_blocks: int
    global_blocks: int = 1
    num_patterns: int = 1
    horizontal: bool = False
    block: int = 64

    def __post_init__(self) -> None:
        L, g, n = self.window_blocks, self.global_blocks, self.num_patterns
        require_positive(
            "Fixed",
            window_blocks=L,
            global_blocks=g,
            num_patterns=n,
            block=self.block,
        )
        if n * g > L:
            fewer = f"global_blocks=1 of num_patterns={L}"
            if g <= L:
                fewer = f"num_patterns={L // g} or less"
            elif n <= L:
                fewer = f"global_blocks={L // n} or less"
            raise OptionError(
                f"num_patterns={n} of global_blocks={g} in window_blocks={L}",
                at="Fixed",
                because=f"{n * g} global blocks do not lie in a window of {L}",
                instead=f"{fewer}, or window_blocks={n * g}",
            )

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """The same window, or a global block."""
        i, j = _blocks(self.block)
        L, n = self.window_blocks, self.num_patterns
        same = equals_zero(sympy.floor(i / L) - sympy.floor(j / L))
        ways = [same]
        num_blocks = -(-int(spec.length) // self.block)
        for residue in range(min(n, spec.num_heads)):
            whose = equals_zero(sympy.Mod(H, n) - residue)
            ways.append(conjunction(whose, self._is_global(j, residue, num_blocks)))
            if self.horizontal:
                ways.append(conjunction(whose, self._is_global(i, residue, num_blocks)))
        return disjunction(*ways)

    def _is_global(self, x: sympy.Expr, residue: int, num_blocks: int) -> Boolean:
        """Whether block ``x`` is global for heads of this residue by n."""
        L, g = self.window_blocks, self.global_blocks
        first = L - (1 + residue) * g
        end = num_blocks - num_blocks % L
        within = _in_range(sympy.Mod(x, L), first, first + g)
        found = conjunction(within, at_least_zero(end - 1 - x))
        if end == num_blocks:
            return found
        start = min(end + first, num_blocks - g)
        return disjunction(found, _in_range(x, start, start + g))


@dataclass(frozen=True, slots=True)
class Variable(MaskPattern):
    """Windows of any widths end to end, and global ranges.

    Attributes:
        windows: blocks in each window; the last repeats.
        global_ranges: half-open ranges of blocks that are seen by all.
        random_blocks: random blocks in each row, of each head its own.
        horizontal: whether global blocks also see all.
        block: tokens in a block.
        seed: of the choice of blocks.
    """

    windows: tuple[int, ...]
    global_ranges: tuple[tuple[int, int], ...] = ()
    random_blocks: int = 0
    horizontal: bool = False
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        freeze(self, "windows")
        freeze_pairs(self, "global_ranges", "(start, stop)")
        require_positive("Variable", windows=self.windows, block=self.block)
        require_not_negative(
            "Variable", random_blocks=self.random_blocks, seed=self.seed
        )
        if not self.windows:
            raise OptionError(
                "windows=() for 1 block or more",
                at="Variable",
                because="every block lies in one",
                instead="windows=(1,) for the own block alone, or wider ones",
            )
        for n, (start, stop) in enumerate(self.global_ranges):
            require_not_negative("Variable", **{f"global_ranges[{n}][0]": start})
            if start >= stop:
                raise OptionError(
                    f"global_ranges[{n}]={start, stop}",
                    at="Variable",
                    because=f"it ends before block {stop}, and starts at {start}",
                    instead=f"{start, start + 1} for one block, or leave it out",
                )

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """The same window, a global block, or a random one."""
        i, j = _blocks(self.block)
        *edges, _ = accumulate(self.windows, initial=0)
        last, width = edges[-1], self.windows[-1]
        ways = [
            conjunction(_in_range(i, a, b), _in_range(j, a, b))
            for a, b in pairwise(edges)
        ]
        same = equals_zero(
            sympy.floor((i - last) / width) - sympy.floor((j - last) / width)
        )
        beyond = at_least_zero(i - last), at_least_zero(j - last)
        ways.append(conjunction(same, *beyond))
        ways.append(_in_ranges(j, self.global_ranges))
        if self.horizontal:
            ways.append(_in_ranges(i, self.global_ranges))
        return _add_random(disjunction(*ways), self, spec)


@dataclass(frozen=True, slots=True)
class BigBird(MaskPattern):
    """A local window, the first blocks, and random ones.

    Attributes:
        window_blocks: blocks that the window is wide, both sides together.
        global_blocks: first blocks that see and are seen by all.
        random_blocks: random blocks in each row, of each head its own.
        block: tokens in a block.
        seed: of the choice of blocks.

    Source: arXiv 2007.14062.
    """

    window_blocks: int
    global_blocks: int
    random_blocks: int
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("BigBird", window_blocks=self.window_blocks, block=self.block)
        require_not_negative(
            "BigBird",
            global_blocks=self.global_blocks,
            random_blocks=self.random_blocks,
            seed=self.seed,
        )

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """``abs(i - j) <= window_blocks // 2``, ``i < g``, ``j < g``, or random."""
        near = _near(self.block, self.window_blocks // 2)
        given = disjunction(near, *_first(self.global_blocks, self.block))
        return _add_random(given, self, spec)

    def with_reach(self, reach: int) -> Self:
        """The same with a window of ``2 * reach + 1`` blocks."""
        return replace(self, window_blocks=2 * reach + 1)


@dataclass(frozen=True, slots=True)
class Longformer(MaskPattern):
    """A local window, and chosen blocks that see and are seen by all.

    Attributes:
        window_blocks: blocks that the window is wide, both sides together.
        global_indices: the chosen blocks.
        block: tokens in a block.

    Source: arXiv 2004.05150, in blocks.
    """

    window_blocks: int
    global_indices: tuple[int, ...] = ()
    block: int = 64

    def __post_init__(self) -> None:
        freeze(self, "global_indices")
        require_positive(
            "Longformer", window_blocks=self.window_blocks, block=self.block
        )
        require_not_negative(
            "Longformer",
            **{f"global_indices[{n}]": x for n, x in enumerate(self.global_indices)},
        )

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """The window, or ``i`` or ``j`` in the chosen blocks."""
        del spec
        ranges = [(n, n + 1) for n in sorted(set(self.global_indices))]
        near = _near(self.block, self.window_blocks // 2)
        return disjunction(near, *(_in_ranges(x, ranges) for x in _blocks(self.block)))

    def with_reach(self, reach: int) -> Self:
        """The same with a window of ``2 * reach + 1`` blocks."""
        return replace(self, window_blocks=2 * reach + 1)


@dataclass(frozen=True, slots=True)
class Hierarchical(MaskPattern):
    """Wider spans at coarser strides.

    Attributes:
        levels: ``(span, stride)`` in blocks; a query sees every ``stride``-th block of
            its span.
        block: tokens in a block.
    """

    levels: tuple[tuple[int, int], ...]
    block: int = 64

    def __post_init__(self) -> None:
        freeze_pairs(self, "levels", "(span, stride)")
        require_positive("Hierarchical", block=self.block)
        for n, level in enumerate(self.levels):
            require_positive("Hierarchical", **{f"levels[{n}]": level})

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """``i == j``, or the same span and ``j mod stride == 0``."""
        del spec
        i, j = _blocks(self.block)
        ways = [equals_zero(i - j)]
        for span, stride in self.levels:
            same = equals_zero(sympy.floor(i / span) - sympy.floor(j / span))
            ways.append(conjunction(same, equals_zero(sympy.Mod(j, stride))))
        return disjunction(*ways)


def _add_random(
    given: Boolean, pattern: BigBird | Variable, spec: AttentionSpec
) -> Boolean:
    """``given``, and random blocks that it does not hold."""
    if not pattern.random_blocks:
        return given
    block = pattern.block
    # In blocks: a layout says of a block's first token what it says of all of them.
    first = {Q: Q * block, K: K * block}
    table = RandomBlocks(
        pattern.seed,
        pattern.random_blocks,
        spec.num_heads,
        -(-int(spec.length) // block),
        spec.is_causal,
        format_sexpr(canonicalize(given.xreplace(first))),
    )
    return disjunction(given, is_on(table, H, *_blocks(block)))


def _require_window(pattern: MaskPattern, window: int, block: int) -> None:
    if window < block:
        raise OptionError(
            f"window={window} with block={block}",
            at=type(pattern).__name__,
            because="a window narrower than a block reaches no other block",
            instead=f"block={window} or less, or window={block} or more",
        )
