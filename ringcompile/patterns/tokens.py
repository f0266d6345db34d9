"""Sparse layouts of single tokens (SEMANTICS.md section 3)."""

from dataclasses import dataclass, replace
from typing import Self

import sympy
from sympy.logic.boolalg import Boolean

from ringcompile.ir.mask import (
    K,
    Q,
    at_least_zero,
    causal,
    conjunction,
    disjunction,
    equals_zero,
    prefix,
    window,
)
from ringcompile.patterns.base import (
    AttentionSpec,
    MaskPattern,
    require_not_negative,
    require_positive,
)


@dataclass(frozen=True, slots=True)
class Strided(MaskPattern):
    """The last tokens, and every so-many-th before; causal.

    Attributes:
        stride: tokens l.

    Source: Sparse Transformer, arXiv 1904.10509.
    """

    stride: int

    def __post_init__(self) -> None:
        require_positive("Strided", stride=self.stride)

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """``k <= q`` and (``q - k < l`` or ``(q - k) mod l == 0``)."""
        del spec
        near = at_least_zero(self.stride - 1 - Q + K)
        far = equals_zero(sympy.Mod(Q - K, self.stride))
        return conjunction(causal(), disjunction(near, far))


@dataclass(frozen=True, slots=True)
class Sinks(MaskPattern):
    """The first tokens and the last ones; causal.

    Attributes:
        sinks: first tokens that all see.
        window: last tokens, the own one among them.

    Source: StreamingLLM, arXiv 2309.17453.
    """

    sinks: int
    window: int

    def __post_init__(self) -> None:
        require_not_negative("Sinks", sinks=self.sinks)
        require_positive("Sinks", window=self.window)

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """``k <= q`` and (``k < sinks`` or ``k > q - window``)."""
        del spec
        near = window(self.window - 1)
        return conjunction(causal(), disjunction(prefix(self.sinks), near))

    def with_reach(self, reach: int) -> Self:
        """The same with a window of ``reach`` tokens before the own one."""
        return replace(self, window=reach + 1)


@dataclass(frozen=True, slots=True)
class DilatedWindow(MaskPattern):
    """Every so-many-th token around the own one.

    Attributes:
        window: tokens seen on each side.
        dilation: distance of those.

    Source: Longformer, arXiv 2004.05150.
    """

    window: int
    dilation: int = 1

    def __post_init__(self) -> None:
        require_not_negative("DilatedWindow", window=self.window)
        require_positive("DilatedWindow", dilation=self.dilation)

    def keeps(self, spec: AttentionSpec) -> Boolean:
        """``(q - k) mod dilation == 0`` and ``abs(q - k) <= window * dilation``."""
        del spec
        reach = self.window * self.dilation
        near = window(reach, reach)
        return conjunction(near, equals_zero(sympy.Mod(Q - K, self.dilation)))

    def with_reach(self, reach: int) -> Self:
        """The same with ``reach`` tokens on each side."""
        return replace(self, window=reach)
