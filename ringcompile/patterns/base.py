"""What a pattern is, and how patterns compose.

A pattern turns a mask into parts, each a mask and the rows that take part; the parts'
results are merged by their LSE. Invariant: the user's mask is a conjunct of every part.
"""

import logging
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Protocol, Self, runtime_checkable

from sympy.logic.boolalg import Boolean
from torch import SymInt

from ringcompile.errors import OptionError
from ringcompile.ir.mask import (
    EmptyRow,
    H,
    Mask,
    at_least_zero,
    causal,
    conjunction,
    disjunction,
)
from ringcompile.ir.schedule import PartSpec
from ringcompile.plan.kept import count_kept

log = logging.getLogger(__name__)

Parts = Sequence[PartSpec]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a pattern may ask of the attention that it is put on.

    Attributes:
        num_heads: query heads H.
        num_kv_heads: KV heads G; H is a multiple of it.
        length: tokens S. Under ``dynamic=True`` it may be symbolic, and ``int`` of it
            makes a graph that serves this length alone.
        is_causal: whether the user's mask lets no query see a later key.
    """

    num_heads: int
    num_kv_heads: int
    length: int | SymInt
    is_causal: bool = False


@runtime_checkable
class Pattern(Protocol):
    """What ``attention=`` takes: comparable, hashable, and able to make parts."""

    def build_parts(self, mask: Mask, spec: AttentionSpec) -> Parts:
        """The masks and row selections whose results are merged.

        A plain tuple, or `MixedParts` where the output is more than that.

        Args:
            mask: the user's own.
            spec: the attention.
        """
        ...


class MaskPattern:
    """A pattern that is one predicate over all rows; a base class for users' own.

    A subclass is a frozen dataclass that defines ``keeps``. ``a & b`` keeps what both
    keep, ``a | b`` what any does; ``a & LongNet(...)`` restricts every part of it.
    """

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """The pairs that count, over ``ringcompile.ir.mask``'s ``H``, ``Q``, ``K``."""
        raise NotImplementedError

    def build_parts(self, mask: Mask, spec: AttentionSpec) -> Parts:
        """One part."""
        return ((without_mean(mask) & self.keeps(spec), None),)

    def density(
        self, length: int, *, num_heads: int = 1, is_causal: bool = False
    ) -> float:
        """Kept pairs over all pairs, ``length ** 2``; the mean over heads.

        Args:
            length: tokens S; no S x S tensor is made.
            num_heads: query heads H, where heads differ.
            is_causal: whether a causal mask is put on top; pairs are then those of the
                lower triangle, ``S (S + 1) / 2``.
        """
        require_positive(type(self).__name__, length=length, num_heads=num_heads)
        keeps = self.keeps(AttentionSpec(num_heads, num_heads, length, is_causal))
        if is_causal:
            keeps = conjunction(keeps, causal())
        heads = range(num_heads if H in keeps.free_symbols else 1)
        kept = sum(count_kept(keeps, length, head=h) for h in heads)
        pairs = length * (length + 1) // 2 if is_causal else length**2
        return kept / (pairs * len(heads))

    def with_density(
        self, length: int, density: float, *, is_causal: bool = False
    ) -> Self:
        """The same pattern with the window whose density comes nearest, which it logs.

        Args:
            length: tokens S.
            density: the share of pairs to keep, above 0 and at most 1.
            is_causal: as for ``density``.

        Returns:
            A pattern with another window, the narrower of two that are as near. Its
            ``density(length)`` is what was got.

        Raises:
            OptionError: the pattern has no window, or there is no such density.
        """
        _require_share(density, type(self).__name__)

        def density_of(reach: int) -> float:
            return self.with_reach(reach).density(length, is_causal=is_causal)

        above = bisect_left(range(length - 1), density, key=density_of)
        near = (max(above - 1, 0), above)
        reach = min(near, key=lambda n: abs(density_of(n) - density))
        found = self.with_reach(reach)
        log.warning(
            "%s: density %.3g over %d tokens, for %.3g asked",
            found,
            density_of(reach),
            length,
            density,
        )
        return found

    def with_reach(self, reach: int) -> Self:
        """The same with a window that reaches ``reach`` steps to each side.

        A step is a block, or a token where the window counts those.

        Raises:
            OptionError: the pattern has no window.
        """
        del reach
        name = type(self).__name__
        raise OptionError(
            f"{name} has no window",
            at=f"{name}.with_density",
            because="a density is met by widening a window",
            instead="LocalWindow, GlobalLocal, BigBird, Longformer, Sinks or"
            " DilatedWindow; or set the numbers and ask density(length)",
        )

    def __and__(self, other: Pattern) -> Pattern:
        """What both keep."""
        if isinstance(other, MaskPattern):
            return _Both(self, other)
        return _Within(self, other) if _is_pattern(other) else NotImplemented

    def __rand__(self, other: Pattern) -> Pattern:
        """What both keep."""
        return self & other

    def __or__(self, other: "MaskPattern") -> "MaskPattern":
        """What any keeps."""
        if not _is_pattern(other):
            return NotImplemented
        if not isinstance(other, MaskPattern):
            raise OptionError(
                f"{self} | {other}",
                at="pattern",
                because="a dilated pattern counts pairs, and a union of counts is none",
                instead="patterns that are masks on both sides, or `&`",
            )
        return _Any(self, other)


def _is_pattern(value: object) -> bool:
    return isinstance(value, Pattern)


@runtime_checkable
class Segmented(Protocol):
    """A pattern whose queries see keys of their own segment only."""

    @property
    def segments(self) -> tuple[int, ...]:
        """Segment lengths ``w_i``, in tokens."""
        ...


def find_segment(pattern: object) -> int | None:
    """The largest segment length of a pattern; None where it has no segments."""
    if isinstance(pattern, _Within):
        return find_segment(pattern.pattern)
    return max(pattern.segments) if isinstance(pattern, Segmented) else None


@dataclass(frozen=True, slots=True)
class _Both(MaskPattern):
    a: MaskPattern
    b: MaskPattern

    def keeps(self, spec: AttentionSpec) -> Boolean:
        return conjunction(self.a.keeps(spec), self.b.keeps(spec))


@dataclass(frozen=True, slots=True)
class _Any(MaskPattern):
    a: MaskPattern
    b: MaskPattern

    def keeps(self, spec: AttentionSpec) -> Boolean:
        return disjunction(self.a.keeps(spec), self.b.keeps(spec))


@dataclass(frozen=True, slots=True)
class _Within:
    """A pattern of several parts, each restricted to a mask."""

    within: MaskPattern
    pattern: Pattern

    def build_parts(self, mask: Mask, spec: AttentionSpec) -> Parts:
        return self.pattern.build_parts(mask & self.within.keeps(spec), spec)

    @property
    def scorer(self) -> object:
        """The module that an ``Adaptive`` learns with."""
        return getattr(self.pattern, "scorer", None)


@dataclass(frozen=True, slots=True)
class AtDensity(MaskPattern):
    """A pattern whose window is set by the length that it meets.

    Attributes:
        pattern: one with a window.
        share: the share of pairs to keep, above 0 and at most 1; what
            ``pattern.with_density`` takes, and tells of what it got.
    """

    pattern: MaskPattern
    share: float

    def __post_init__(self) -> None:
        _require_share(self.share, "AtDensity")
        self.pattern.with_reach(0)  # raises where there is no window

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """Those of the pattern with the window that comes nearest."""
        return self._settle(int(spec.length), spec.is_causal).keeps(spec)

    def _settle(self, length: int, is_causal: bool) -> MaskPattern:
        return _settle_density(self.pattern, length, self.share, is_causal)


@lru_cache(maxsize=256)
def _settle_density(
    pattern: MaskPattern, length: int, share: float, is_causal: bool
) -> MaskPattern:
    return pattern.with_density(length, share, is_causal=is_causal)


@dataclass(frozen=True, slots=True)
class PerHead(MaskPattern):
    """Another pattern for each run of query heads.

    Attributes:
        patterns: one for each run; runs are ``H // n`` heads long, the first
            ``H mod n`` one longer.
    """

    patterns: tuple[MaskPattern, ...]

    def __post_init__(self) -> None:
        freeze(self, "patterns")
        if not self.patterns:
            raise OptionError(
                "0 patterns for 1 head or more",
                at="PerHead",
                because="every head has one",
                instead='one pattern or more, or "exact" without PerHead',
            )
        for n, pattern in enumerate(self.patterns):
            if not isinstance(pattern, MaskPattern):
                raise OptionError(
                    f"patterns[{n}]={pattern!r}",
                    at="PerHead",
                    because="runs of heads are told apart in a mask, and it is none",
                    instead="patterns that are masks, or GroupedDilated, whose groups "
                    "of heads differ",
                )

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """Each head's own."""
        ways = []
        num_heads, num_patterns = spec.num_heads, len(self.patterns)
        if num_patterns > num_heads:
            raise OptionError(
                f"{num_patterns} patterns for {num_heads} heads",
                at="PerHead",
                because=f"{num_patterns - num_heads} of them would have no head",
                instead=f"{num_heads} patterns or fewer, or {num_patterns} heads",
            )
        runs = split_heads(num_heads, num_patterns)
        for pattern, heads in zip(self.patterns, runs, strict=True):
            if heads:
                first, last = at_least_zero(H - heads[0]), at_least_zero(heads[-1] - H)
                ways.append(conjunction(first, last, pattern.keeps(spec)))
        return disjunction(*ways)


def split_heads(num_heads: int, num_groups: int) -> list[range]:
    """Consecutive groups of heads; the first ``H mod n`` have one head more."""
    size, longer = divmod(num_heads, num_groups)
    starts = [n * size + min(n, longer) for n in range(num_groups + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def without_mean(mask: Mask) -> Mask:
    """``mask`` with zeros for rows without a key, as every pattern gives."""
    return replace(mask, empty_row=EmptyRow.ZERO)


def _require_share(density: object, at: str) -> None:
    is_number = isinstance(density, int | float) and not isinstance(density, bool)
    if not (is_number and 0 < density <= 1):  # type: ignore[operator]
        raise OptionError(
            f"density={density}",
            at=at,
            because="it is the share of pairs that are kept",
            instead="a number above 0 and at most 1",
        )


def require_positive(at: str, **sizes: int | tuple[int, ...]) -> None:
    """Raise unless each number is whole and at least 1."""
    for name, value in sizes.items():
        values = value if isinstance(value, tuple) else (value,)
        for n, number in enumerate(values):
            where = f"{name}[{n}]" if len(values) > 1 else name
            _require_at_least(1, at, where, number)


def require_not_negative(at: str, **sizes: int) -> None:
    """Raise unless each number is whole and at least 0."""
    for name, number in sizes.items():
        _require_at_least(0, at, name, number)


def _require_at_least(least: int, at: str, name: str, number: object) -> None:
    is_whole = isinstance(number, int) and not isinstance(number, bool)
    if isinstance(number, int) and is_whole and number >= least:
        return
    raise OptionError(
        f"{name}={number!r}",
        at=at,
        because=f"it counts tokens, blocks or heads, of which {least} is the least"
        if is_whole
        else "it counts tokens, blocks or heads, in whole numbers",
        instead=f'{name}=1 or more, or "exact" in place of the pattern'
        if least
        else f"{name}=0, or more",
    )


def freeze(pattern: object, *names: str) -> None:
    """Turn lists that a frozen dataclass was given into tuples."""
    for name in names:
        value = getattr(pattern, name)
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise OptionError(
                f"{name}={value!r}",
                at=type(pattern).__name__,
                because="there may be several",
                instead=f"a tuple or a list: {name}=({value!r},)",
            )
        object.__setattr__(pattern, name, tuple(value))


def freeze_pairs(pattern: object, name: str, meaning: str) -> None:
    """Turn a list of pairs that a frozen dataclass was given into a tuple of tuples."""
    freeze(pattern, name)
    pairs = []
    for pair in getattr(pattern, name):
        if not isinstance(pair, Sequence) or len(pair) != _PAIR:
            raise OptionError(
                f"{name}={getattr(pattern, name)!r}",
                at=type(pattern).__name__,
                because=f"it holds pairs {meaning}, and {pair!r} is none",
                instead=f"{name}=(({meaning.strip('()')}),), or () for none",
            )
        pairs.append(tuple(pair))
    object.__setattr__(pattern, name, tuple(pairs))


_PAIR = 2
