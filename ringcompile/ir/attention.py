"""One attention's plan as one rank runs it: what the ring op carries as text."""

from dataclasses import dataclass

from ringcompile.ir.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Dropout:
    """Weights that are dropped, the others scaled up.

    Attributes:
        rate: share of weights that are dropped, below 1.
        seed: number of the capture that holds the seed.
    """

    rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Bias:
    """How a float tensor ``(B or 1, H or 1, rows, columns)`` is added to scores.

    Attributes:
        is_cut: whether ``rows`` are this rank's own queries; else there is one row.
        is_relative: whether column ``k - q + S - 1`` of ``2 S - 1`` is meant for query
            q and key k; else column k of S, or the one column there is.
    """

    is_cut: bool = False
    is_relative: bool = False


@dataclass(frozen=True, slots=True)
class RankPlan:
    """Everything ``ringcompile::ring_attention`` needs beside its tensors.

    Attributes:
        index: number of the attention in its model; makes its tags unique.
        name: what errors and traces call it, e.g. ``model.layers.3 (model.py:12)``.
        rank: this rank's place in the schedule.
        group_name: the process group's name; empty for one rank.
        scale: factor of ``<Q, K>``.
        timeout_s: a hop older than this raises.
        schedule: what all ranks do.
        sources: hash of the lowering's source files (a cached graph must not survive
            their change).
        block_order: in which order the blocks of a masked tile are computed:
            ``natural``, query rows after query rows, or ``hilbert``, along the curve.
        kernel: ``auto``: each tile by the device's best kernel; ``flex``: by generated
            ones, where they carry its mask; ``math``: by plain operators.
        transport: how hops travel: ``p2p``, by the process group; ``copy_engine``, by
            copies out of the sender's memory; ``auto``: by these where they can.
        dropout: of weights; None if none is dropped.
        softcap: scaled scores x become ``softcap * tanh(x / softcap)`` before biases
            are added; None: they stay.
        biases: how each tensor of ``biases`` is added to scores.
        member: this rank's place among those that deal out heads (``Ulysses``).
    """

    index: int
    name: str
    rank: int
    group_name: str
    scale: float
    timeout_s: float
    schedule: Schedule
    sources: str
    block_order: str = "natural"
    kernel: str = "auto"
    transport: str = "p2p"
    dropout: Dropout | None = None
    softcap: float | None = None
    biases: tuple[Bias, ...] = ()
    member: int = 0

    def find_peer(self, *, rank: int | None = None, member: int | None = None) -> int:
        """The rank in the group of another place; what is left out is as here."""
        rank = self.rank if rank is None else rank
        member = self.member if member is None else member
        return rank * self.schedule.ulysses.size + member

    @property
    def changes_scores(self) -> bool:
        """Whether scores are more than scaled products."""
        return self.softcap is not None or bool(self.biases)

    @property
    def is_dense(self) -> bool:
        """Whether kernels without a mask may compute tiles in which all pairs count."""
        return (
            self.kernel != "math" and self.dropout is None and not self.changes_scores
        )

    @property
    def takes_dense_kernels(self) -> bool:
        """Whether such kernels do compute all of those tiles."""
        return self.is_dense and self.kernel != "flex"
