"""Dilated patterns whose numbers do not fit each other, the heads or the ranks."""

from dataclasses import dataclass

from support.pattern_cases import PatternCase, consecutive, grouped, longnet


@dataclass(frozen=True, slots=True)
class Uneven:
    """One case.

    Attributes:
        case: the pattern and its dense meaning.
        heads: H and G.
        length: tokens S.
        is_causal: whether the user's mask is causal.
    """

    case: PatternCase
    heads: tuple[int, int]
    length: int = 43
    is_causal: bool = True


UNEVEN: dict[str, Uneven] = {
    "12 heads of 5 patterns": Uneven(
        grouped((5, 9, 16, 33, 60), (1, 2, 3, 4, 5)), (12, 4)
    ),
    "5 heads of 3 patterns, divided": Uneven(
        grouped((8, 24, 60), (1, 2, 4), divides=True), (5, 5), is_causal=False
    ),
    "fewer heads than patterns": Uneven(
        grouped((5, 9, 16), (1, 2, 3), divides=True), (2, 1)
    ),
    "one segment, longer than S": Uneven(longnet((100,), (7,), "paper"), (4, 2)),
    "segments over several ranks": Uneven(
        longnet((17, 31), (3, 4), "torchscale"), (4, 2), is_causal=False
    ),
    "detached": Uneven(
        longnet((7, 19, 64), (2, 3, 5), "paper", weights="detached"), (6, 2)
    ),
    "sum of segments under S": Uneven(consecutive((9, 14, 5), (2, 3, 7)), (2, 1)),
    "fewer tokens than ranks": Uneven(
        longnet((2, 8), (1, 2), "kv_head"), (2, 2), length=3
    ),
}
