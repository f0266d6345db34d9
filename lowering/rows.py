"""Rows of a shard: which ones a tile reads, and running results over them.

The dim of rows is 2 in every tensor here: ``(B, H, T, D)`` and ``(B, H, T)``.
Invariant: symbolic sizes are never compared, so that no guard on the length is added.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import SymInt, Tensor

from ringcompile import ops
from ringcompile.ir.layout import Edge
from ringcompile.ir.schedule import Rows

Size = int | SymInt
Values = tuple[Tensor, ...]

_LSE_DIM = 3


def resolve(edge: Edge, chunk: Size) -> Size:
    """The row number of an edge."""
    return edge[0] * chunk + edge[1]


def shift(rows: Rows, by: Edge) -> Rows:
    """The same rows, counted from the row ``by``."""
    (a, b), (c, d) = rows.start, rows.stop
    return Rows((a - by[0], b - by[1]), (c - by[0], d - by[1]))


def take_rows(x: Tensor, rows: Rows, chunk: Size, *, dim: int = 2) -> Tensor:
    """A range of rows of ``x``."""
    start, stop = resolve(rows.start, chunk), resolve(rows.stop, chunk)
    return x.narrow(dim, start, stop - start)


@dataclass(frozen=True, slots=True)
class Span:
    """A range of rows of a shard."""

    rows: Rows
    chunk: Size

    @property
    def count(self) -> Size:
        """How many rows."""
        return resolve(self.rows.stop, self.chunk) - resolve(
            self.rows.start, self.chunk
        )

    @property
    def wire_count(self) -> Size:
        """How many travel, per head."""
        return self.count

    @property
    def own_rows(self) -> Rows:
        """All of these rows, counted from the first."""
        return shift(self.rows, self.rows.start)

    @property
    def shard_rows(self) -> Rows:
        """Where in the shard ``place`` puts values."""
        return self.rows

    def take(self, x: Tensor) -> Tensor:
        """These rows of a shard."""
        return take_rows(x, self.rows, self.chunk)

    def positions(self, of_shard: Tensor) -> Tensor:
        """Their global positions ``(1, n)``, from those of the shard ``(T,)``."""
        return take_rows(of_shard[None], self.rows, self.chunk, dim=1)

    def place(self, values: Values) -> tuple[Rows, Values]:
        """Where in the shard ``values`` belong, one row for each row of the span."""
        return self.rows, values

    def pack(self, x: Tensor) -> Tensor:
        """These rows, ``(B, H, n, D)``, as they travel."""
        return x

    def unpack(self, x: Tensor) -> Tensor:
        """``pack`` undone."""
        return x

    def pack_none(self, x: Tensor) -> Tensor:
        """No rows of ``x``, as they travel."""
        return x[:, :, :0]


@dataclass(frozen=True, slots=True)
class SelectedSpan(Span):
    """A range of rows in a part with a selection: it travels as tables there do.

    Attributes:
        heads: how many heads take these rows.
    """

    heads: int

    @property
    def wire_count(self) -> Size:
        """How many travel, of all heads."""
        return self.heads * self.count

    def pack(self, x: Tensor) -> Tensor:
        """These rows, ``(B, heads, n, D)``, as they travel: ``(B, heads * n, D)``."""
        return x.flatten(1, 2)

    def unpack(self, x: Tensor) -> Tensor:
        """``pack`` undone."""
        return x.view(x.shape[0], self.heads, -1, x.shape[2])

    def pack_none(self, x: Tensor) -> Tensor:
        """No rows of ``x``, as they travel."""
        return x[:, 0, :0]


PRESENT, PLACES = "present of ", "places of "


@dataclass(frozen=True, slots=True)
class Wire:
    """How rows travel where heads have different numbers: those of all end to end.

    Attributes:
        spec: what the table's rows are, as ``ops.ROW_TABLE`` takes it.
        count: how many rows travel, of all heads together.
        device: where the table lies.
    """

    spec: str
    count: int
    device: torch.device

    @property
    def present(self) -> Tensor:
        """Which of the table's ``heads * count`` rows are not absent, ``(n,)``."""
        return self._table(PRESENT)[0]

    @property
    def places(self) -> Tensor:
        """Where each row of the table travels, ``(heads, count)``; 0 for no row."""
        return self._table(PLACES)

    def _table(self, what: str) -> Tensor:
        table: Tensor = ops.ROW_TABLE(what + self.spec, device=self.device)
        return table


@dataclass(frozen=True, slots=True)
class Table:
    """Rows picked one by one, for each head or for all alike.

    Attributes:
        index: row numbers in the shard, ``(heads or 1, count)`` int64, -1 for no row.
        count: rows per head, absent ones included.
        shard: all rows of the shard.
        shard_size: how many they are.
        wire: how they travel; None: all heads take the same rows, none of them absent,
            and they travel by head.
    """

    index: Tensor
    count: int
    shard: Rows
    shard_size: int
    wire: Wire | None

    @property
    def wire_count(self) -> int:
        """How many travel: of all heads, or per head where all take the same."""
        return self.count if self.wire is None else self.wire.count

    @property
    def own_rows(self) -> Rows:
        """All of these rows, counted from the first."""
        return Rows((0, 0), (0, self.count))

    @property
    def shard_rows(self) -> Rows:
        """Where in the shard ``place`` puts values."""
        return self.shard

    def take(self, x: Tensor) -> Tensor:
        """These rows of a shard; an absent one is a copy of some other."""
        if self.wire is None:
            return x.index_select(2, self.index[0])
        index = self.index.clamp(min=0)
        return x.gather(2, _broadcast_index(index, x))

    def positions(self, of_shard: Tensor) -> Tensor:
        """Their global positions ``(heads, count)``, -1 for no row."""
        picked = of_shard[self.index.clamp(min=0)]
        return torch.where(self.index < 0, -1, picked)

    def place(self, values: Values) -> tuple[Rows, Values]:
        """``values`` scattered into zeros (lse: into -inf) over the whole shard."""
        return self.shard, tuple(self._scatter(x) for x in values)

    def pack(self, x: Tensor) -> Tensor:
        """These rows, ``(B, H, count, D)``, as they travel: ``(B, n, D)``."""
        if self.wire is None:
            return x
        return x.flatten(1, 2).index_select(1, self.wire.present)

    def unpack(self, x: Tensor) -> Tensor:
        """``pack`` undone; an absent row is a copy of some other."""
        if self.wire is None:
            return x
        places = self.wire.places
        shape = (x.shape[0], *places.shape, x.shape[2])
        return x.index_select(1, places.flatten()).view(shape)

    def pack_none(self, x: Tensor) -> Tensor:
        """No rows of ``x``, as they travel."""
        return x[:, :, :0] if self.wire is None else x[:, 0, :0]

    def _scatter(self, x: Tensor) -> Tensor:
        fill = -torch.inf if x.dim() == _LSE_DIM else 0.0
        if self.wire is None:
            shape = (*x.shape[:2], self.shard_size, *x.shape[3:])
            return x.new_full(shape, fill).index_copy(2, self.index[0], x)
        # Absent rows land in one more row, which is cut off.
        index = torch.where(self.index < 0, self.shard_size, self.index)
        shape = (*x.shape[:2], self.shard_size + 1, *x.shape[3:])
        full = x.new_full(shape, fill).scatter(2, _broadcast_index(index, x), x)
        return full.narrow(2, 0, self.shard_size)


@dataclass(frozen=True, slots=True)
class Residues:
    """One row in so many, for each head from a first row of its own, none absent.

    Read and placed by arithmetic, which fuses with what is done to the rows; a scatter
    would be a pass of its own over zeros.

    Attributes:
        firsts: each head's first row in the shard, ``(heads,)`` int64.
        base: the least of them; all are less than ``rate`` rows behind it.
        rate: rows from one to the next.
        count: rows per head.
        heads: how many heads.
        shard: all rows of the shard.
        shard_size: how many they are.
    """

    firsts: Tensor
    base: int
    rate: int
    count: int
    heads: int
    shard: Rows
    shard_size: int

    @property
    def wire_count(self) -> int:
        """How many travel, of all heads."""
        return self.heads * self.count

    @property
    def own_rows(self) -> Rows:
        """All of these rows, counted from the first."""
        return Rows((0, 0), (0, self.count))

    @property
    def shard_rows(self) -> Rows:
        """Where in the shard ``place`` puts values."""
        return self.shard

    @property
    def index(self) -> Tensor:
        """Row numbers in the shard, ``(heads, count)``."""
        numbers = torch.arange(self.count, device=self.firsts.device)
        return self.firsts[:, None] + self.rate * numbers

    def take(self, x: Tensor) -> Tensor:
        """These rows of a shard."""
        return x.gather(2, _broadcast_index(self.index, x))

    def positions(self, of_shard: Tensor) -> Tensor:
        """Their global positions, ``(heads, count)``."""
        return of_shard[self.index]

    def place(self, values: Values) -> tuple[Rows, Values]:
        """``values`` among zeros (lse: among -inf) over the whole shard."""
        behind = torch.arange(self.shard_size, device=self.firsts.device) - self.base
        number = behind.div(self.rate, rounding_mode="floor")
        is_taken = behind - self.rate * number == (self.firsts - self.base)[:, None]
        is_taken &= (number >= 0) & (number < self.count)
        number = number.clamp(0, self.count - 1)

        def spread(x: Tensor) -> Tensor:
            here = is_taken if x.dim() == _LSE_DIM else is_taken[..., None]
            fill = -torch.inf if x.dim() == _LSE_DIM else 0.0
            return torch.where(here, x[:, :, number], fill)

        return self.shard, tuple(map(spread, values))

    def pack(self, x: Tensor) -> Tensor:
        """These rows, ``(B, heads, n, D)``, as they travel: ``(B, heads * n, D)``."""
        return x.flatten(1, 2)

    def unpack(self, x: Tensor) -> Tensor:
        """``pack`` undone."""
        return x.view(x.shape[0], self.heads, -1, x.shape[2])

    def pack_none(self, x: Tensor) -> Tensor:
        """No rows of ``x``, as they travel."""
        return x[:, 0, :0]


RowSet = Span | Table | Residues


def _broadcast_index(index: Tensor, x: Tensor) -> Tensor:
    """``(heads, n)`` as an index for dim 2 of ``x``."""
    index = index[None] if x.dim() == _LSE_DIM else index[None, :, :, None]
    return index.expand(x.shape[0], -1, -1, *x.shape[3:])


class Segments:
    """Running values over rows, cut at every edge that occurs.

    A value that covers some segments is sliced and combined with what is there; nothing
    is written in place, so the compiler can fuse the combining.
    """

    def __init__(
        self,
        spans: Iterable[Rows],
        chunk: Size,
        *,
        combine: Callable[[Values, Values], Values],
    ) -> None:
        edges = {(rows.start, rows.stop) for rows in spans}
        self._chunk = chunk
        # A symbolic chunk length orders edges as a large one does.
        self._edges = sorted({self._canonical(e) for pair in edges for e in pair})
        self._combine = combine
        self._values: list[Values | None] = [None] * (len(self._edges) - 1)

    def _canonical(self, edge: Edge) -> Edge:
        """Of equal edges the same one, as far as that is known."""
        if isinstance(self._chunk, int):
            return 0, edge[0] * self._chunk + edge[1]
        return edge

    def add(self, rows: Rows, values: Values) -> None:
        """Combine ``values``, one row for each of ``rows``, with what is there."""
        first, last = (
            self._edges.index(self._canonical(e)) for e in (rows.start, rows.stop)
        )
        origin = self._edges[first]
        for i in range(first, last):
            segment = shift(Rows(self._edges[i], self._edges[i + 1]), origin)
            piece = values
            if last - first > 1:
                piece = tuple(take_rows(x, segment, self._chunk) for x in values)
            there = self._values[i]
            self._values[i] = piece if there is None else self._combine(there, piece)

    def join(
        self, empty: Callable[[Size], Values], *, dtype: torch.dtype | None = None
    ) -> Values:
        """All rows end to end.

        Args:
            empty: gives so many rows, to which nothing was added.
            dtype: what ``(B, H, n, D)`` is rounded to and laid by token, here and not
                where it is read next: a wide copy would only be read once, and where
                nothing is left to do, nothing waits.
        """
        sizes = (
            resolve(stop, self._chunk) - resolve(start, self._chunk)
            for start, stop in pairwise(self._edges)
        )
        parts = [
            empty(size) if values is None else values
            for values, size in zip(self._values, sizes, strict=True)
        ]
        if dtype is not None:
            parts = [
                tuple(x if x.dim() == _LSE_DIM else x.to(dtype) for x in values)
                for values in parts
            ]
        if len(parts) == 1:
            return parts[0] if dtype is None else tuple(map(lay_by_token, parts[0]))
        join = _join_rows if dtype is None else _join_by_token
        return tuple(map(join, zip(*parts, strict=True)))


def _join_rows(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(xs), 2)


def lay_by_token(x: Tensor) -> Tensor:
    """``x``, a token's rows side by side, as torch's own kernels lay them."""
    if x.dim() == _LSE_DIM:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _join_by_token(xs: Sequence[Tensor]) -> Tensor:
    """Rows end to end, all heads of a token side by side."""
    if xs[0].dim() == _LSE_DIM:
        return _join_rows(xs)
    return join([x.transpose(1, 2) for x in xs], 1).transpose(1, 2)


def join(xs: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat``, each tensor written where it belongs.

    In six dims: of four Inductor takes a tensor of one channel for ``channels_last``,
    writes all of them so, and lays the whole right in a pass of its own.
    """
    joined: Tensor = ops.JOIN([x[None, None] for x in xs], dim + 2)
    return joined[0, 0]


def _cat(xs: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(xs), dim)


ops.LIBRARY.impl("join", _cat, "CompositeExplicitAutograd")
