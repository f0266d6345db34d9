"""What every spelling of attention is read into before its mask is finished."""

from dataclasses import dataclass

from torch.fx import Node

from ringcompile.ir.mask import EmptyRow
from ringcompile.passes.read_score import Score
from ringcompile.passes.regions import Operand
from ringcompile.passes.symbolic import Size


class Refused(Exception):  # noqa: N818
    """An attention that can't be a ring.

    Attributes:
        what: what it is, with the offending value.
        because: why it can't.
        instead: what the user can do.
    """

    def __init__(self, what: str, *, because: str, instead: str) -> None:
        super().__init__(what)
        self.what = what
        self.because = because
        self.instead = instead


@dataclass(frozen=True, slots=True)
class Parts:
    """An attention.

    Attributes:
        output: its last node.
        shape: ``(B, H, queries, keys)``.
        q, k, v: its operands.
        score: how scores are scaled and masked.
        infinite: what a query gives whose scores are all -inf; None if a query without
            keys gives what no ring can.
        dropout: share of weights that are dropped.
        transposed: whether the output is a view of ``(B, H, E, S)``.
        empty_row: what a query without keys gives, however they were dropped, if known.
    """

    output: Node
    shape: tuple[Size, ...]
    q: Operand
    k: Operand
    v: Operand
    score: Score
    infinite: EmptyRow | None
    dropout: float = 0.0
    transposed: bool = False
    empty_row: EmptyRow | None = None


def check_dropout(rate: float) -> float:
    """Refuse what would divide by zero; else the rate."""
    if rate >= 1:
        raise Refused(
            f"attention with dropout p={rate} of its weights",
            because="what is kept is divided by 1 - p",
            instead="a p below 1",
        )
    return rate


def check_lengths(q_length: Size, k_length: Size, v_length: Size) -> None:
    """Refuse lengths that no ring has; guard that K's is V's, as eager demands."""
    if k_length != v_length:
        raise Refused(
            f"attention over {k_length} keys with {v_length} values",
            because="each key has one value",
            instead="give K and V one length",
        )
    if any(length in (0, 1) for length in (q_length, k_length)):
        raise Refused(
            f"attention of {q_length} queries over {k_length} keys",
            because="a sequence of one token, or of none, can't be cut over ranks",
            instead="nothing; this attention runs gathered",
        )
