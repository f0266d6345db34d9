"""Dilated attention: patterns of segment length ``w`` and dilation rate ``r``.

Selected rows are gathered, attended and scattered back (SEMANTICS.md section 2).
Invariant: a part's mask and its selection keep the same pairs.
"""

from dataclasses import dataclass

import sympy

from ringcompile.errors import OptionError
from ringcompile.ir.mask import (
    H,
    K,
    Mask,
    Q,
    at_least_zero,
    causal,
    chunked,
    conjunction,
    conjuncts,
    equals_zero,
)
from ringcompile.ir.schedule import MixedParts, Mixing, PartSpec, Selection
from ringcompile.patterns.base import (
    AttentionSpec,
    Parts,
    freeze,
    require_positive,
    split_heads,
    without_mean,
)

_OFFSETS = ("paper", "torchscale", "kv_head")
_WEIGHTS = ("joint", "detached")


@dataclass(frozen=True, slots=True)
class LongNet:
    """Dilated attention in which every head uses every pattern (section 2A).

    Attributes:
        segments: segment lengths ``w_i``, in tokens.
        rates: dilation rates ``r_i``, one for each segment length.
        offset: which residue a head selects: ``paper`` (``h mod r``), ``torchscale``
            (``h // ceil(H / r)``) or ``kv_head`` (``(h // U) mod r``).
        weights: ``joint``: gradients flow through the mixing weights of the patterns.
            ``detached``: they are constants, as in torchscale. Then backward reads each
            pattern's own output: its selected rows are saved beside the mixed output,
            the sum of ``1 / r_i`` of its size.

    Source: arXiv 2307.02486, sections 2.2 and 2.3.
    """

    segments: tuple[int, ...]
    rates: tuple[int, ...]
    offset: str = "paper"
    weights: str = "joint"

    def __post_init__(self) -> None:
        _check_dilation(self)
        for name, rules in (("offset", _OFFSETS), ("weights", _WEIGHTS)):
            if (value := getattr(self, name)) not in rules:
                raise OptionError(
                    f"{name}={value!r}",
                    at="LongNet",
                    because="there is no such rule",
                    instead=" or ".join(f"{name}={rule!r}" for rule in rules),
                )

    def build_parts(self, mask: Mask, spec: AttentionSpec) -> Parts:
        """One part for each (segment, rate)."""
        parts: list[PartSpec] = []
        for segment, rate in zip(self.segments, self.rates, strict=True):
            within = without_mean(mask) & chunked(segment)
            if rate == 1 and not _is_dense(mask):
                parts.append((within, None))
                continue
            offset = self._offset(rate, spec)
            offsets = tuple(int(offset.subs(H, h)) for h in range(spec.num_heads))
            selection = Selection(segment, rate, offsets, spec.num_kv_heads)
            if selection.has_mixed_groups:
                # A KV head brings the rows of all its query heads: each sees its own.
                within &= equals_zero(sympy.Mod(sympy.Mod(K, segment), rate) - offset)
            parts.append((within, selection))
        mixing = Mixing(is_detached=self.weights == "detached")
        return MixedParts(tuple(parts), mixing)

    def _offset(self, rate: int, spec: AttentionSpec) -> sympy.Expr:
        """The residue that head ``h`` selects."""
        if self.offset == "torchscale":
            return sympy.floor(H / -(-spec.num_heads // rate))
        shared = spec.num_heads // spec.num_kv_heads
        return sympy.Mod(
            sympy.floor(H / (shared if self.offset == "kv_head" else 1)), rate
        )


@dataclass(frozen=True, slots=True)
class GroupedDilated:
    """Dilated attention in which each group of heads has one pattern (section 2B).

    Attributes:
        segments: segment lengths ``w_i``, in tokens.
        rates: dilation rates ``r_i``; head group i selects the residue ``i mod r_i``.
        divide_by_groups: whether the output is divided by the number of patterns.

    Source: fkodom/dilated-attention-pytorch, without its signed sum over positions.
    """

    segments: tuple[int, ...]
    rates: tuple[int, ...]
    divide_by_groups: bool = False

    def __post_init__(self) -> None:
        _check_dilation(self)

    def build_parts(self, mask: Mask, spec: AttentionSpec) -> Parts:
        """One part for each group of heads."""
        parts = []
        groups = split_heads(spec.num_heads, len(self.segments))
        for n, (segment, rate) in enumerate(
            zip(self.segments, self.rates, strict=True)
        ):
            heads, offset = groups[n], n % rate
            if not heads:
                continue
            offsets = tuple(
                offset if h in heads else None for h in range(spec.num_heads)
            )
            own = conjunction(at_least_zero(H - heads[0]), at_least_zero(heads[-1] - H))
            within = without_mean(mask) & chunked(segment) & own
            parts.append((within, Selection(segment, rate, offsets, spec.num_kv_heads)))
        divisor = len(self.segments) if self.divide_by_groups else 1
        return MixedParts(tuple(parts), Mixing(divisor))


@dataclass(frozen=True, slots=True)
class ConsecutiveDilated:
    """Segments of other lengths and rates laid end to end (section 2C).

    Attributes:
        segments: segment lengths ``w_i``, in tokens; each is used once, in order, and
            tokens past their sum see nothing.
        rates: dilation rates ``r_i``: a query sees the keys of its segment a multiple
            of ``r_i`` away.
    """

    segments: tuple[int, ...]
    rates: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_dilation(self)

    def build_parts(self, mask: Mask, spec: AttentionSpec) -> Parts:
        """One part for each segment and residue."""
        parts: list[PartSpec] = []
        start = 0
        for segment, rate in zip(self.segments, self.rates, strict=True):
            stop = start + segment
            bounds = [at_least_zero(x - start) for x in (Q, K)]
            bounds += [at_least_zero(stop - 1 - x) for x in (Q, K)]
            within = without_mean(mask) & conjunction(*bounds)
            if rate == 1 and not _is_dense(mask):
                parts.append((within, None))
                start = stop
                continue
            parts += [
                (
                    within,
                    Selection(
                        segment,
                        rate,
                        (residue,) * spec.num_heads,
                        spec.num_kv_heads,
                        start,
                        stop,
                    ),
                )
                for residue in range(min(rate, segment))
            ]
            start = stop
        return tuple(parts)


def _is_dense(mask: Mask) -> bool:
    """Whether dense kernels take all of a segment's rows under this mask.

    Of another mask, coverage by tiles says which rows are needed.
    """
    return conjuncts(mask.keeps) in {(), (causal(),)}


def _check_dilation(pattern: LongNet | GroupedDilated | ConsecutiveDilated) -> None:
    freeze(pattern, "segments", "rates")
    at = type(pattern).__name__
    segments, rates = pattern.segments, pattern.rates
    if not segments and not rates:
        raise OptionError(
            "0 segments with 0 rates",
            at=at,
            because="a dilated pattern has 1 segment length or more, not 0",
            instead="a segment length and its rate, or attention='exact'",
        )
    if len(segments) != len(rates):
        names = ("segments", "rates")
        short, long = names if len(segments) < len(rates) else names[::-1]
        missing = abs(len(segments) - len(rates))
        raise OptionError(
            f"{len(segments)} segments with {len(rates)} rates",
            at=at,
            because="each segment length has one rate",
            instead=f"{missing} more in {short}, or {missing} fewer in {long}",
        )
    require_positive(at, segments=segments, rates=rates)
