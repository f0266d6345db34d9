"""What happens to scores between Q.K and softmax: scale, and which pairs are dropped.

A score is ``scale * <q, k>`` where it is kept. Elsewhere a number so low was added, or
put in its place, that its weight is zero. Invariant: what changes a kept score other
than by a factor is refused.
"""

import math
from dataclasses import dataclass, replace

import torch
from sympy.logic.boolalg import Boolean

from ringcompile.ir.mask import FALSE, TRUE, EmptyRow, conjunction, negate
from ringcompile.passes.symbolic import Case, Unreadable, Value, read_cases


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
class Score:
    """Scores as a function of the indices ``i0..i3`` of their 4-D tensor.

    Attributes:
        scale: factor of ``<q, k>``.
        keeps: the pairs whose score is ``scale * <q, k>``.
        drops: the ways in which the others were dropped.
        dtype: dtype of the tensor that was masked last.
    """

    scale: float
    keeps: Boolean = TRUE
    drops: frozenset[Drop] = frozenset()
    dtype: torch.dtype = torch.float32

    def multiply(self, factor: float, dtype: torch.dtype) -> "Score":
        """Every score times ``factor``, in ``dtype``."""
        numbers = {d: round_to(d.number * factor, dtype) for d in self.drops}
        for number in numbers.values():
            _check_drops(number, dtype)
        drops = frozenset(replace(d, number=n) for d, n in numbers.items())
        return replace(self, scale=self.scale * factor, drops=drops)

    def cast(self, dtype: torch.dtype) -> "Score":
        """Every score rounded to ``dtype``: a low number may become -inf."""
        rounded = {replace(d, number=round_to(d.number, dtype)) for d in self.drops}
        return replace(self, drops=frozenset(rounded))

    def add(self, mask: Value, dtype: torch.dtype) -> "Score":
        """A mask added; scores then have ``dtype``."""
        kept, dropped = _split(read_cases(mask.broadcast(4)), dtype)
        drops = {Drop(n, replaces=False) for n in dropped}
        drops |= self.drops
        for old in self.drops:
            drops |= {Drop(round_to(old.number + n, dtype), False) for n in dropped}
        keeps = conjunction(self.keeps, kept)
        return Score(self.scale, keeps, frozenset(drops), dtype)

    def fill(self, where: Boolean, number: float, dtype: torch.dtype) -> "Score":
        """Scores replaced by a number in some places."""
        number = round_to(number, dtype)
        _check_drops(number, dtype)
        drops = self.drops | {Drop(number, replaces=True)}
        keeps = conjunction(self.keeps, negate(where))
        return Score(self.scale, keeps, drops, dtype)

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
        _check_drops(number, dtype)
    return kept, list(numbers)


def _check_drops(number: float, dtype: torch.dtype) -> None:
    if not number <= torch.finfo(dtype).min / 2:
        raise Unreadable(
            f"{number} is added to scores of {dtype}, or put in their place; only 0,"
            " -inf and torch.finfo(dtype).min are known to keep or drop a key"
        )


def round_to(number: float, dtype: torch.dtype) -> float:
    """The nearest number that a dtype has."""
    return float(
        torch.tensor(number, dtype=torch.float64, device="cpu").to(dtype).item()
    )
