"""Schedules: what each rank computes at each step and what travels meanwhile.

At a step of shift ``i`` rank ``r`` computes with the K and V of rank ``(r - i) mod P``,
which sends them straight to it: a step is one permutation of the ranks. Invariant: all
ranks run the same steps in the same order; a rank's part in one may be empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import overload

from torch import Tensor

from ringcompile.ir.layout import Edge, Layout, Side
from ringcompile.ir.mask import Mask


class Coverage(Enum):
    """How much of a tile the mask keeps."""

    EMPTY = "."
    PARTIAL = "/"
    FULL = "#"


class Kernel(Enum):
    """Which kernel a piece needs."""

    FULL = "full"  # every pair counts
    CAUSAL = "causal"  # square, row i sees rows j <= i
    MASKED = "masked"  # the predicate is evaluated on positions


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``[start, stop)`` of a shard, each edge affine in the chunk length."""

    start: Edge
    stop: Edge

    def resolve(self, chunk: int) -> tuple[int, int]:
        """The row numbers for chunk length ``chunk``."""
        (a, b), (c, d) = self.start, self.stop
        return a * chunk + b, c * chunk + d

    def __str__(self) -> str:
        return f"{_format_edge(self.start)}:{_format_edge(self.stop)}"


def format_runs(runs: Sequence[Rows]) -> str:
    """Runs of rows as people read them."""
    return ",".join(map(str, runs)) or "none"


def _format_edge(edge: Edge) -> str:
    chunks, rows = edge
    if not chunks:
        return str(rows)
    unit = "c" if chunks == 1 else f"{chunks}c"
    return unit if not rows else f"{unit}{rows:+d}"


@dataclass(frozen=True, slots=True)
class Piece:
    """One kernel call: some query rows against some KV rows of one tile."""

    q: Rows
    kv: Rows
    kernel: Kernel


@dataclass(frozen=True, slots=True)
class Tile:
    """The work of one (query shard, KV shard) pair.

    Attributes:
        coverage: how much of the tile the mask keeps.
        pieces: the kernel calls, disjoint in (q, kv) rows; none if empty. Of a part
            with a selection: one MASKED piece that stands for all selected rows.
        needs: runs of the owner's KV rows that the pieces read, in order, no two of
            which touch; none if empty.
    """

    coverage: Coverage
    pieces: tuple[Piece, ...] = ()
    needs: tuple[Rows, ...] = ()


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows that take part, per query head (dilated attention).

    Position ``p`` is selected for query head ``h`` iff ``start <= p < stop`` and
    ``((p - start) mod segment) mod rate == offsets[h]``; a head whose offset is None
    has no rows. A KV head's rows are the union over its query heads. Rows a query may
    see are those of its segment only, so no others travel; the part's mask says so too.

    Attributes:
        segment: tokens in a segment.
        rate: one row in ``rate`` is selected.
        offsets: one per query head.
        num_kv_heads: KV heads that the query heads share.
        start: first position of the first segment.
        stop: past the last position; None: no end.
    """

    segment: int
    rate: int
    offsets: tuple[int | None, ...]
    num_kv_heads: int
    start: int = 0
    stop: int | None = None

    def covers(self, at: Tensor) -> Tensor:
        """Which positions lie in a segment."""
        is_behind = at >= self.start
        return is_behind if self.stop is None else is_behind & (at < self.stop)

    def segments_of(self, at: Tensor) -> Tensor:
        """The number of each position's segment."""
        return (at - self.start).div(self.segment, rounding_mode="floor")

    def residues_of(self, at: Tensor) -> Tensor:
        """The offset that selects each position."""
        return (at - self.start) % self.segment % self.rate

    @property
    def groups(self) -> tuple[frozenset[int], ...]:
        """The offsets that each KV head's query heads select."""
        size = len(self.offsets) // self.num_kv_heads
        return tuple(
            frozenset(s for s in self.offsets[start : start + size] if s is not None)
            for start in range(0, len(self.offsets), size)
        )

    @property
    def has_mixed_groups(self) -> bool:
        """Whether query heads that share a KV head select different rows."""
        return any(len(group) > 1 for group in self.groups)


@dataclass(frozen=True, slots=True)
class Mixing:
    """How the outputs of parts become one: by their LSE, and then as this says.

    Attributes:
        divisor: the merged output is divided by it.
        is_detached: whether gradients take the weights of the parts as constants. Then
            each part's own output is saved for backward: those of its selected rows.
    """

    divisor: int = 1
    is_detached: bool = False

    def __str__(self) -> str:
        words = [f"out / {self.divisor}"] if self.divisor > 1 else []
        return ", ".join(words + ["detached weights"] * self.is_detached)


@dataclass(frozen=True, slots=True)
class Ulysses:
    """How ranks trade their shards of all heads for all their tokens of some heads.

    Of ``size`` ranks, one after the other, each gives every other the rows of its
    heads before the ring and gets its own rows back behind it; in between they are one
    rank of the schedule, whose shard is theirs end to end.

    Attributes:
        size: how many; 1: none, and nothing is traded.
        chunks: runs that a rank of the model's layout holds: 2 of zigzag, whose later
            ones lie in the opposite order.
    """

    size: int = 1
    chunks: int = 1


PartSpec = tuple[Mask, Selection | None]


@dataclass(frozen=True, slots=True)
class MixedParts(Sequence[PartSpec]):
    """Parts that are not just merged: what a plain tuple of them cannot say.

    Attributes:
        parts: a mask and the rows that take part, for each.
        mixing: how their outputs become one.
    """

    parts: tuple[PartSpec, ...]
    mixing: Mixing

    @overload
    def __getitem__(self, n: int) -> PartSpec: ...
    @overload
    def __getitem__(self, n: slice) -> tuple[PartSpec, ...]: ...
    def __getitem__(self, n: int | slice) -> PartSpec | tuple[PartSpec, ...]:
        return self.parts[n]

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of the schedule on every rank.

    Attributes:
        shift: rank r computes with the KV of rank ``(r - shift) mod P``.
        tiles: ``tiles[r]`` is what rank r computes.
    """

    shift: int
    tiles: tuple[Tile, ...]

    @property
    def is_idle(self) -> bool:
        """Whether no rank has work, so that the step can be dropped."""
        return all(t.coverage is Coverage.EMPTY for t in self.tiles)


@dataclass(frozen=True, slots=True)
class Part:
    """Tiles over one row selection; the parts of a schedule are merged by their LSE.

    Attributes:
        mask: the pairs that count, among the rows that take part.
        selection: the rows that take part; None means all.
        stages: steps grouped so that the hops of a stage fly during the one before.
    """

    mask: Mask
    selection: Selection | None
    stages: tuple[tuple[Step, ...], ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in order; the first is the rank's own KV (shift 0)."""
        return tuple(step for stage in self.stages for step in stage)

    def is_one_call(self, step: Step) -> bool:
        """Whether on every rank one kernel without a mask computes a step, if any."""
        return self.selection is None and all(
            len(tile.pieces) <= 1
            and len(tile.needs) <= 1
            and all(piece.kernel is not Kernel.MASKED for piece in tile.pieces)
            for tile in step.tiles
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """What all ranks do for one attention.

    Attributes:
        layout: which positions each rank holds.
        length: tokens S; None: the schedule serves every S that needs no padding.
        parts: one for plain attention; several for dilated attention.
        mixing: how the outputs of parts become one.
        keys: where keys and values lie; None: as the queries do. Else the edges of KV
            rows are affine in the chunk length of this side.
        ulysses: how each rank of it is made of several.
    """

    layout: Layout
    length: int | None
    parts: tuple[Part, ...]
    mixing: Mixing = Mixing()
    keys: Side | None = None
    ulysses: Ulysses = Ulysses()

    @property
    def cp_size(self) -> int:
        """Number of ranks that K and V go round; each may be several (Ulysses)."""
        return self.layout.cp_size

    @property
    def q_side(self) -> Side:
        """Where queries lie."""
        return Side(self.layout, self.length)

    @property
    def kv_side(self) -> Side:
        """Where keys and values lie."""
        return self.keys or self.q_side

    @property
    def has_masked_tiles(self) -> bool:
        """Whether some rank evaluates a predicate."""
        return any(
            piece.kernel is Kernel.MASKED
            for part in self.parts
            for step in part.steps
            for tile in step.tiles
            for piece in tile.pieces
        )

    @property
    def place(self) -> str:
        """The layouts as people read them."""
        if self.keys is None:
            return str(self.layout)
        return f"{self.layout}, keys {self.keys}"

    def __str__(self) -> str:
        heads = f"heads over {self.ulysses.size} ranks"
        words = [f"schedule {self.place}", str(self.mixing)]
        words += [heads] * (self.ulysses.size > 1)
        lines = [" | ".join(filter(None, words))]
        for number, part in enumerate(self.parts):
            lines.append(f"  part {number}: {part.mask}")
            for step_number, step in enumerate(part.steps):
                cells = " ".join(
                    f"kv{(r - step.shift) % self.cp_size}{t.coverage.value}"
                    for r, t in enumerate(step.tiles)
                )
                lines.append(f"    step {step_number}: {cells}")
        return "\n".join(lines)
