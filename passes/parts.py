"""What every spelling of attention is read into before its mask is finished."""

from dataclasses import dataclass

from torch.fx import Node

from ringcompile.ir.mask import EmptyRow
from ringcompile.passes.op import is_float, shape_of
from ringcompile.passes.read_score import Score
from ringcompile.passes.regions import Operand
from ringcompile.torch_private import sizes_equal


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
        output: its last node, ``(B, H, S, E)``.
        q, k, v: its operands.
        score: how scores are scaled and masked.
        infinite: what a query gives whose scores are all -inf; None if a query without
            keys gives what no ring can.
        dropout: share of weights that are dropped.
    """

    output: Node
    q: Operand
    k: Operand
    v: Operand
    score: Score
    infinite: EmptyRow | None
    dropout: float = 0.0


def check_dropout(rate: float) -> float:
    """Refuse what would divide by zero; else the rate."""
    if rate >= 1:
        raise Refused(
            f"attention with dropout p={rate} of its weights",
            because="what is kept is divided by 1 - p",
            instead="a p below 1",
        )
    return rate


def check_operands(
    output: Node, q: Node, k: Node, v: Node, *, k_transposed: bool = False
) -> None:
    """Refuse ranks, dtypes and lengths that no ring is built for yet.

    Args:
        output: the attention's result.
        q: ``(B, H, S, D)``.
        k: ``(B, G, S, D)``, or ``(B, G, D, S)`` if ``k_transposed``.
        v: ``(B, G, S, E)``.
        k_transposed: see ``k``.
    """
    nodes = (q, k, v)
    ranks = {len(shape_of(n)) for n in (*nodes, output)}
    if ranks != {4}:
        raise Refused(
            f"attention on {min(ranks)}-D tensors",
            because="only (batch, heads, sequence, features) is built so far (issue 4)",
            instead="give Q, K and V the four dims (batch, heads, sequence, features)",
        )
    dtypes = {n.meta["val"].dtype for n in (*nodes, output)}
    if len(dtypes) != 1 or not all(map(is_float, nodes)):
        raise Refused(
            f"attention on Q, K, V and result of {sorted(map(str, dtypes))}",
            because="a ring computes in the one dtype of its operands",
            instead="cast Q, K and V to one dtype",
        )
    batches = [shape_of(n)[0] for n in nodes]
    if not all(sizes_equal(batches[0], size) for size in batches[1:]):
        raise Refused(
            f"attention with batch sizes {batches} of Q, K and V",
            because="K and V would be broadcast over the batch",
            instead="expand K and V to the batch size of Q",
        )
    length = shape_of(q)[2]
    others = shape_of(k)[3 if k_transposed else 2], shape_of(v)[2]
    if not all(sizes_equal(length, other) for other in others):
        raise Refused(
            f"attention of {length} queries over {others[0]} keys",
            because="attention between sequences of different lengths isn't built yet",
            instead="nothing; this attention runs gathered",
        )
