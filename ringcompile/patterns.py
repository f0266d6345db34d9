"""Patterns: which pairs an attention keeps on top of the user's own mask.

A pattern turns a mask into parts, each a mask and the rows that take part; the parts'
results are merged by their LSE (SEMANTICS.md sections 2 and 3). Invariant: the user's
mask is a conjunct of every part.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import sympy

from ringcompile.errors import OptionError
from ringcompile.ir.mask import (
    EmptyRow,
    H,
    K,
    Mask,
    Q,
    at_least_zero,
    chunked,
    conjunction,
    equals_zero,
)
from ringcompile.ir.schedule import Selection

Parts = tuple[tuple[Mask, Selection | None], ...]


@runtime_checkable
class Pattern(Protocol):
    """What ``attention=`` takes: comparable, hashable, and able to make parts."""

    def build_parts(self, mask: Mask, num_heads: int, num_kv_heads: int) -> Parts:
        """The masks and row selections whose results are merged.

        Args:
            mask: the user's own.
            num_heads: query heads H.
            num_kv_heads: KV heads G; H is a multiple of it.
        """
        ...


_OFFSETS = ("paper", "torchscale", "kv_head")


@dataclass(frozen=True, slots=True)
class LongNet:
    """Dilated attention in which every head uses every pattern (SEMANTICS.md 2A).

    Attributes:
        segments: segment lengths ``w_i``, in tokens.
        rates: dilation rates ``r_i``, one for each segment length.
        offset: which residue a head selects: ``paper`` (``h mod r``), ``torchscale``
            (``h // ceil(H / r)``) or ``kv_head`` (``(h // U) mod r``).
        weights: ``joint``: gradients flow through the mixing weights.

    Source: arXiv 2307.02486, sections 2.2 and 2.3.
    """

    segments: tuple[int, ...]
    rates: tuple[int, ...]
    offset: str = "paper"
    weights: str = "joint"

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        object.__setattr__(self, "rates", tuple(self.rates))
        _check_same_length(self.segments, self.rates)
        _check_positive("segments", self.segments)
        _check_positive("rates", self.rates)
        if self.offset not in _OFFSETS:
            raise OptionError(
                f"offset={self.offset!r}",
                at="LongNet",
                because="no such rule",
                instead=f"one of {', '.join(_OFFSETS)}",
            )
        if self.weights != "joint":
            is_known = self.weights == "detached"
            raise OptionError(
                f"weights={self.weights!r}",
                at="LongNet",
                because="it is not built yet" if is_known else "no such rule",
                instead='weights="joint"',
            )

    def build_parts(self, mask: Mask, num_heads: int, num_kv_heads: int) -> Parts:
        """One part for each (segment, rate)."""
        parts: list[tuple[Mask, Selection | None]] = []
        for segment, rate in zip(self.segments, self.rates, strict=True):
            within = _without_mean(mask) & chunked(segment)
            if rate == 1:
                parts.append((within, None))
                continue
            offset = self._offset(rate, num_heads, num_kv_heads)
            offsets = tuple(int(offset.subs(H, h)) for h in range(num_heads))
            selection = Selection(segment, rate, offsets, num_kv_heads)
            if selection.has_mixed_groups:
                # A KV head brings the rows of all its query heads: each sees its own.
                within &= equals_zero(sympy.Mod(sympy.Mod(K, segment), rate) - offset)
            parts.append((within, selection))
        return tuple(parts)

    def _offset(self, rate: int, num_heads: int, num_kv_heads: int) -> sympy.Expr:
        """The residue that head ``h`` selects."""
        if self.offset == "torchscale":
            return sympy.floor(H / -(-num_heads // rate))
        shared = num_heads // num_kv_heads if self.offset == "kv_head" else 1
        return sympy.Mod(sympy.floor(H / shared), rate)


@dataclass(frozen=True, slots=True)
class LocalWindow:
    """Blocks at most half a window apart (SEMANTICS.md section 3).

    Attributes:
        window: tokens that the window is wide, both sides together.
        block: tokens in a block.
    """

    window: int
    block: int = 64

    def __post_init__(self) -> None:
        _check_positive("window", (self.window,))
        _check_positive("block", (self.block,))
        if self.window < self.block:
            raise OptionError(
                f"window={self.window} with block={self.block}",
                at="LocalWindow",
                because="a window narrower than a block reaches no other block",
                instead=f"block={self.window} or less, or a wider window",
            )

    def build_parts(self, mask: Mask, num_heads: int, num_kv_heads: int) -> Parts:
        """One part: ``abs(q // b - k // b) <= (window // b) // 2``."""
        del num_heads, num_kv_heads  # all heads alike
        apart = sympy.floor(Q / self.block) - sympy.floor(K / self.block)
        reach = self.window // self.block // 2
        near = conjunction(at_least_zero(reach - apart), at_least_zero(reach + apart))
        return ((_without_mean(mask) & near, None),)


def _without_mean(mask: Mask) -> Mask:
    """``mask`` with zeros for rows without a key, as every pattern gives."""
    return replace(mask, empty_row=EmptyRow.ZERO)


def _check_positive(name: str, values: tuple[int, ...]) -> None:
    for n, value in enumerate(values):
        if value < 1:
            where = f"{name}[{n}]" if len(values) > 1 else name
            raise OptionError(
                f"{where}={value}",
                at="pattern",
                because="it counts tokens, and 1 is the least",
                instead=f"{name} of at least 1",
            )


def _check_same_length(segments: tuple[int, ...], rates: tuple[int, ...]) -> None:
    if len(segments) != len(rates) or not segments:
        raise OptionError(
            f"{len(segments)} segments with {len(rates)} rates",
            at="LongNet",
            because="each segment length has one rate, and there is at least one",
            instead="two tuples of the same length",
        )
