"""Layouts: which global positions each rank holds, in order.

A layout cuts ``S`` tokens (padded to a multiple of ``cp_size * chunks_per_rank``) into
chunks of ``c`` tokens. Each chunk a rank holds is a *run*: positions
``start + stride * i`` for ``i < c``, where ``start`` is affine in ``c``; but for
``hilbert``, whose chunks are parts of a curve over one known length. Invariant: the
positions of all ranks are a permutation of the padded positions.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringcompile.errors import OptionError
from ringcompile.ir.hilbert import order_tokens

Edge = tuple[int, int]
"""``(chunks, rows)``: the row ``chunks * c + rows`` for chunk length ``c``."""

LAYOUTS = ("contiguous", "zigzag", "striped", "hilbert")


@dataclass(frozen=True, slots=True)
class Run:
    """The positions of one chunk: ``start + stride * i``, ``i < c``."""

    start: Edge
    stride: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A named layout over ``cp_size`` ranks (SEMANTICS.md sections 4a and 5).

    Attributes:
        name: ``contiguous``, ``zigzag``, ``striped`` or ``hilbert``.
        cp_size: number of ranks.
        segment: of ``hilbert``, tokens that one curve goes through, so that segments
            stay in order; None: a single curve over all.
        level: of ``hilbert``, n of the curve over ``4^n`` cells; None: the least that
            holds a segment.
    """

    name: str
    cp_size: int
    segment: int | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise OptionError(
                f"layout={self.name!r}",
                at="options",
                because="no such layout",
                instead=f"one of {', '.join(LAYOUTS)}",
            )
        assert self.cp_size >= 1, "a layout needs at least one rank"
        if self.segment is not None and (self.has_runs or self.segment < 1):
            raise OptionError(
                f"layout={self.name!r} with segment={self.segment}",
                at="options",
                because="only hilbert has segments, of one token or more",
                instead="leave segment out",
            )
        if self.level is not None and self.has_runs:
            raise OptionError(
                f"layout={self.name!r} with hilbert_level={self.level}",
                at="options",
                because="only hilbert goes along a curve",
                instead='layout="hilbert", or leave hilbert_level out',
            )

    @classmethod
    def parse(cls, text: str, cp_size: int) -> "Layout":
        """Read ``key`` back."""
        name, *numbers = text.split("/")
        return cls(name, cp_size, *(int(n) if n else None for n in numbers))

    @property
    def key(self) -> str:
        """Name, segment and level in one word."""
        numbers = ("" if n is None else str(n) for n in (self.segment, self.level))
        return "/".join((self.name, *numbers)).rstrip("/")

    @property
    def has_runs(self) -> bool:
        """Whether chunks are runs, the same for every length."""
        return self.name != "hilbert"

    @property
    def chunks_per_rank(self) -> int:
        """Chunks (runs of positions) each rank holds."""
        return 2 if self.name == "zigzag" else 1

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole sequence."""
        return self.cp_size * self.chunks_per_rank

    def chunk_size(self, length: int) -> int:
        """Tokens in a chunk for a sequence of ``length`` tokens, padding included."""
        return (length + self.num_chunks - 1) // self.num_chunks

    def shard_size(self, length: int) -> int:
        """Tokens on each rank, padding included."""
        return self.chunk_size(length) * self.chunks_per_rank

    def runs(self, rank: int) -> tuple[Run, ...]:
        """The chunks that ``rank`` holds, in their order in its shard."""
        assert self.has_runs, "a curve has no runs: ask for positions"
        if self.name == "zigzag":
            return (Run((rank, 0), 1), Run((2 * self.cp_size - 1 - rank, 0), 1))
        if self.name == "striped":
            return (Run((0, rank), self.cp_size),)
        return (Run((rank, 0), 1),)

    def positions(self, rank: int, length: int) -> tuple[int, ...]:
        """Global positions of the rows of ``rank``; those >= ``length`` are padding."""
        chunk = self.chunk_size(length)
        if not self.has_runs:
            order = _order(self.segment, self.level, length, chunk * self.cp_size)
            return order[rank * chunk : (rank + 1) * chunk]
        return tuple(
            run.start[0] * chunk + run.start[1] + run.stride * i
            for run in self.runs(rank)
            for i in range(chunk)
        )

    def position_tensor(
        self,
        rank: int,
        chunk: int,
        device: torch.device | str = "cpu",
        *,
        length: int | None = None,
    ) -> Tensor:
        """The same as an int64 tensor ``(T,)``.

        Args:
            rank: whose rows.
            chunk: tokens in a chunk; may be symbolic.
            device: where it is made.
            length: tokens S, without which a curve is not known; runs need none.
        """
        if not self.has_runs:
            assert length is not None, "a curve goes through a known number of tokens"
            return torch.tensor(self.positions(rank, length), device=device)
        rows = torch.arange(chunk * self.chunks_per_rank, device=device)
        first, *others = self.runs(rank)
        at = rows * first.stride + (first.start[0] * chunk + first.start[1])
        for number, run in enumerate(others, 1):
            later = (rows - number * chunk) * run.stride
            start = run.start[0] * chunk + run.start[1]
            at = torch.where(rows < number * chunk, at, later + start)
        return at

    def merge(self, size: int) -> "Layout":
        """The layout of groups of ``size`` ranks, one after the other."""
        assert self.name in {"contiguous", "zigzag"}, f"neighbours of {self.name}"
        assert self.cp_size % size == 0, f"groups of {size} of {self.cp_size} ranks"
        cp_size = self.cp_size // size
        return Layout("contiguous" if cp_size == 1 else self.name, cp_size)

    def permutation(self, length: int) -> tuple[int, ...]:
        """``pi``: the global position of each row of all shards laid end to end."""
        return tuple(p for r in range(self.cp_size) for p in self.positions(r, length))

    def inverse(self, length: int) -> tuple[int, ...]:
        """Where, among all shards laid end to end, each global position lies."""
        order = self.permutation(length)
        where = [0] * len(order)
        for row, position in enumerate(order):
            where[position] = row
        return tuple(where)

    def __str__(self) -> str:
        return f"{self.key} x{self.cp_size}"


@dataclass(frozen=True, slots=True)
class Side:
    """The queries or the keys of an attention, as ranks hold them.

    Attributes:
        layout: which positions each rank holds.
        length: tokens S; None: any S that needs no padding.
    """

    layout: Layout
    length: int | None

    @property
    def has_pads(self) -> bool:
        """Whether some rank holds pads."""
        return self.length is not None and self.length % self.layout.num_chunks != 0

    @property
    def chunk(self) -> int | None:
        """Tokens in a chunk, where that is known."""
        return None if self.length is None else self.layout.chunk_size(self.length)

    def at(self, length: int) -> "Side":
        """The same for a known length: its own, or ``length`` if that is open."""
        return Side(self.layout, length) if self.length is None else self

    def __str__(self) -> str:
        length = "" if self.length is None else f" of {self.length}"
        return f"{self.layout}{length}"


@lru_cache(maxsize=16)
def _order(
    segment: int | None, level: int | None, length: int, padded: int
) -> tuple[int, ...]:
    """Positions along a curve through each segment, then the pads."""
    size = max(1, min(segment or length, length))
    whole, rest = divmod(length, size)
    starts = range(0, whole * size, size)
    order = [start + p for start in starts for p in order_tokens(size, level)]
    order += [whole * size + p for p in order_tokens(rest, level)]
    return (*order, *range(length, padded))
