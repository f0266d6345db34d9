"""What happens to scores between Q.K and softmax: scale, softcap, biases, masks.

A score is ``scale * <q, k>``, or ``cap * tanh`` of it, plus biases, where it is kept.
Elsewhere a number so low was added, or put in its place, that its weight is zero.
Invariant: what changes a kept score otherwise is refused.
"""

import math
from dataclasses import dataclass, replace

import torch
from sympy import Expr
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ringcompile.ir.mask import FALSE, TRUE, EmptyRow, conjunction, negate
from ringcompile.passes.symbolic import Case, Content, Unreadable, read_cases


@dataclass(frozen=True, slots=True)
class Drop:
    """How pairs were dropped.

    Attributes:
        number: what was added to their score, or put in its place.
        replaces: whether it was put in its place.
    """

    number: float
    replaces: bool


@dataclass(frozen=True, slots=True)
class BiasTerm:
    """A float tensor that was added to scores.

    Attributes:
        node: the tensor.
        index: into it, of the score of ``i0 .. i3``.
        factor: what it is multiplied with.
    """

    node: Node
    index: tuple[Expr, ...]
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class FactorTerm:
    """A float tensor that products were multiplied with, or divided by.

    Attributes:
        node: the tensor.
        index: into it, of the score of ``i0 .. i3``.
        divides: whether they were divided by it.
    """

    node: Node
    index: tuple[Expr, ...]
    divides: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """Scores as a function of batch, head, query and key, ``i0 .. i3``.

    Attributes:
        scale: factor of ``<q, k>``; of what tanh is taken of, with a ``cap``.
        keeps: the pairs whose score is not dropped.
        drops: the ways in which the others were dropped.
        dtype: dtype of the tensor that was masked last.
        cap: factor of the tanh of the scaled product; None if no tanh was taken.
        biases: what was added.
        shifted: whether each query's largest score was taken off.
        factors: what products were multiplied with, beside ``scale``.
        sinks: the score of one more key, whose value is 0: a node of ``(H,)``, or one
            number for all heads.
    """

    scale: float
    keeps: Boolean = TRUE
    drops: frozenset[Drop] = frozenset()
    dtype: torch.dtype = torch.float32
    cap: float | None = None
    biases: tuple[BiasTerm, ...] = ()
    sinks: Node | float | None = None
    shifted: bool = False
    factors: tuple[FactorTerm, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether scores are scaled products, and nothing else yet."""
        is_changed = self.cap is not None or self.biases or self.shifted
        return not is_changed and self.sinks is None and self.keeps == TRUE

    def multiply(self, factor: float, dtype: torch.dtype) -> "Score":
        """Every score times ``factor``, in ``dtype``."""
        self._check_no_sink()
        if factor == 0 or not math.isfinite(factor):
            raise Unreadable(f"scores are multiplied with {factor}")
        numbers = {d: round_to(d.number * factor, dtype) for d in self.drops}
        for drop, number in numbers.items():
            check_drops(number, dtype, replaces=drop.replaces)
        drops = frozenset(replace(d, number=n) for d, n in numbers.items())
        biases = tuple(replace(b, factor=b.factor * factor) for b in self.biases)
        changed = replace(self, drops=drops, biases=biases)
        if self.cap is not None:
            return replace(changed, cap=self.cap * factor)
        return replace(changed, scale=self.scale * factor)

    def multiply_by(self, factor: FactorTerm) -> "Score":
        """Every product times a tensor, while scores are nothing more."""
        if not self.is_plain:
            raise Unreadable("scores are multiplied by a tensor once they are changed")
        return replace(self, factors=(*self.factors, factor))

    def cast(self, dtype: torch.dtype) -> "Score":
        """Every score rounded to ``dtype``: a low number may become -inf."""
        rounded = {replace(d, number=round_to(d.number, dtype)) for d in self.drops}
        return replace(self, drops=frozenset(rounded))

    def at_least(self, number: float) -> "Score":
        """Every score, but none below ``number``, which is as low as a dropped one."""
        if self.biases or self.shifted:
            raise Unreadable("the greatest is taken of biased or shifted scores")
        check_drops(number, self.dtype)
        raised = {replace(d, number=max(d.number, number)) for d in self.drops}
        return replace(self, drops=frozenset(raised))

    def take_tanh(self) -> "Score":
        """The tanh of every score."""
        if not self.is_plain:
            raise Unreadable("tanh is taken of scores that are masked or biased")
        return replace(self, cap=1.0)

    def add(self, mask: Content, dtype: torch.dtype) -> "Score":
        """A mask added; scores then have ``dtype``."""
        self._check_no_sink()
        kept, dropped = _split(read_cases(mask), dtype)
        drops = {Drop(n, replaces=False) for n in dropped}
        drops |= self.drops
        for old in self.drops:
            drops |= {Drop(round_to(old.number + n, dtype), False) for n in dropped}
        keeps = conjunction(self.keeps, kept)
        changed = replace(self, keeps=keeps, drops=frozenset(drops), dtype=dtype)
        return changed.refuse_shift()

    def bias(self, term: BiasTerm) -> "Score":
        """A float tensor added."""
        self._check_no_sink()
        if self.dtype is torch.float16 and self.drops:
            raise Unreadable("float16 scores are biased once keys are dropped")
        return replace(self, biases=(*self.biases, term))

    def shift(self) -> "Score":
        """Each query's largest score taken off all of its scores."""
        return replace(self, shifted=True)

    def sink(self, node: Node | float) -> "Score":
        """One more key for each head."""
        self._check_no_sink()
        if self.shifted:
            raise Unreadable("a sink stands beside scores that were shifted")
        return replace(self, sinks=node)

    def fill(self, where: Boolean, number: float, dtype: torch.dtype) -> "Score":
        """Scores replaced by a number in some places."""
        self._check_no_sink()
        number = round_to(number, dtype)
        check_drops(number, dtype, replaces=True)
        drops = self.drops | {Drop(number, replaces=True)}
        keeps = conjunction(self.keeps, negate(where))
        changed = replace(self, keeps=keeps, drops=drops, dtype=dtype)
        return changed.refuse_shift()

    def refuse_shift(self) -> "Score":
        """Finite numbers that drop keys mean another thing behind a shift."""
        if self.shifted and any(d.number != -math.inf for d in self.drops):
            raise Unreadable("scores are masked once their largest was taken off")
        return self

    def _check_no_sink(self) -> None:
        """Behind a sink, what changes scores would change it too."""
        if self.sinks is not None:
            raise Unreadable("scores are changed once they have a sink")

    def empty_row(self, infinite: EmptyRow) -> EmptyRow:
        """What a query with no key gives.

        Args:
            infinite: what it gives where all scores are -inf.

        Raises:
            Unreadable: dropped keys do not count alike.
        """
        numbers = {d.number for d in self.drops}
        if numbers == {-math.inf}:
            return infinite
        if self.biases and not all(hides_all(n, self.dtype) for n in numbers):
            raise Unreadable(
                f"a query may have no key, and its biases would then count beside"
                f" {sorted(numbers)}"
            )
        coarse = self.dtype is not torch.float16 or all(d.replaces for d in self.drops)
        ways = {d.replaces for d in self.drops}
        if len(numbers) == 1 and len(ways) == 1 and coarse:
            return EmptyRow.MEAN_FILLED if ways == {True} else EmptyRow.MEAN_ALL
        raise Unreadable(
            "a query may have no key, and its weights would then depend on how each key"
            f" was dropped (by {sorted(numbers)} in {self.dtype})"
        )


def _split(cases: tuple[Case, ...], dtype: torch.dtype) -> tuple[Boolean, list[float]]:
    """Where an added mask is 0, and the other numbers that it adds."""
    numbers = {}
    for case in cases:
        if not isinstance(case.number, float) and not case.number.is_Integer:
            raise Unreadable(f"{case.number} is added to scores")
        numbers[float(case.number)] = case.when
    kept = numbers.pop(0.0, FALSE)
    for number in numbers:
        check_drops(number, dtype)
    return kept, list(numbers)


def check_drops(number: float, dtype: torch.dtype, *, replaces: bool = False) -> None:
    """Refuse a number that does not drop a key for certain.

    Where it replaces a score, it is enough that scores so low would have no meaning:
    neighbours in their dtype lie 1 or more apart.
    """
    if hides_all(number, dtype) or (replaces and number <= _find_meaningless(dtype)):
        return
    raise Unreadable(
        f"{number} is added to scores of {dtype}, or put in their place; only 0,"
        " -inf and torch.finfo(dtype).min are known to keep or drop a key"
    )


def hides_all(number: float, dtype: torch.dtype) -> bool:
    """Whether whatever moderate score it is added to is lost."""
    return number <= torch.finfo(dtype).min / 2


def _find_meaningless(dtype: torch.dtype) -> float:
    return -min(max(1 / torch.finfo(dtype).eps, _SURELY_ZERO), _LOWEST_NAMED)


_SURELY_ZERO = 1e4  # exp(-1e4) is 0 in every dtype
_LOWEST_NAMED = 1e8  # float64, too, is filled by the -1e9 of float32


def round_to(number: float, dtype: torch.dtype) -> float:
    """The nearest number that a dtype has."""
    return float(
        torch.tensor(number, dtype=torch.float64, device="cpu").to(dtype).item()
    )
