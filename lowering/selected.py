"""The rows of a shard that a part selects, a tile needs or a curve orders: tables.

Invariant: a table is made by an op when the graph runs, from a few numbers of text, so
that none is baked into the graph; both ends of a hop make the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.layout import Layout
from ringcompile.ir.schedule import Rows, Selection
from ringcompile.lowering.rows import PLACES, PRESENT, Residues, Table, Wire
from ringcompile.lowering.uploads import prepare_upload, upload
from ringcompile.plan.selection import selected_rows
from ringcompile.torch_private import outside_tracing

_NOBODY = -1
_RUNS = "runs="
_ORDER = "order="
_FIRSTS = "firsts of "


@dataclass(frozen=True, slots=True)
class TableSpec:
    """Which rows of which rank's shard.

    Attributes:
        selection: the rows that take part.
        layout: which positions each rank holds.
        length: tokens S.
        rank: whose shard.
        reader: the rank whose queries read these KV rows; None for query rows.
    """

    selection: Selection
    layout: Layout
    length: int
    rank: int
    reader: int | None

    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Row numbers in the shard, for each head."""
        reader = self.reader
        return selected_rows(
            self.selection,
            self.layout.positions(self.rank, self.length),
            length=self.length,
            for_positions=None
            if reader is None
            else self.layout.positions(reader, self.length),
        )

    def find_run(self) -> tuple[int, int] | None:
        """First row and end, if all heads take the same run of rows."""
        rows = set(_rows(str(self)))
        head = rows.pop()
        if rows or not head or head[-1] - head[0] != len(head) - 1:
            return None
        return head[0], head[-1] + 1

    def find_firsts(self) -> tuple[int, ...] | None:
        """Each head's first row, if those and as many others are ``rate`` apart."""
        heads, rate = _rows(str(self)), self.selection.rate
        count = len(heads[0])
        firsts = tuple(head[0] for head in heads if head)
        if len(firsts) < len(heads) or max(firsts) - min(firsts) >= rate:
            return None
        are_apart = all(
            len(head) == count and all(b - a == rate for a, b in pairwise(head))
            for head in heads
        )
        return firsts if are_apart else None

    def positions(self) -> tuple[tuple[int, ...], ...]:
        """Their global positions, -1 where a head has fewer rows than another."""
        of_shard = self.layout.positions(self.rank, self.length)
        return tuple(
            tuple(-1 if row < 0 else of_shard[row] for row in head)
            for head in _padded_rows(str(self))
        )

    def __str__(self) -> str:
        selection, layout = self.selection, self.layout
        offsets = (_NOBODY if s is None else s for s in selection.offsets)
        reader = _NOBODY if self.reader is None else self.reader
        return (
            f"segment={selection.segment} rate={selection.rate}"
            f" offsets={','.join(map(str, offsets))} kv_heads={selection.num_kv_heads}"
            f" start={selection.start} stop={selection.stop or _NOBODY}"
            f" layout={layout.key} cp_size={layout.cp_size} length={self.length}"
            f" rank={self.rank} reader={reader}"
        )

    @classmethod
    def parse(cls, text: str) -> "TableSpec":
        """Read back what ``str`` gave."""
        fields = dict(field.split("=") for field in text.split(" "))
        offsets = map(int, fields["offsets"].split(","))
        reader, stop = int(fields["reader"]), int(fields["stop"])
        return cls(
            Selection(
                segment=int(fields["segment"]),
                rate=int(fields["rate"]),
                offsets=tuple(None if s == _NOBODY else s for s in offsets),
                num_kv_heads=int(fields["kv_heads"]),
                start=int(fields["start"]),
                stop=None if stop == _NOBODY else stop,
            ),
            Layout.parse(fields["layout"], int(fields["cp_size"])),
            length=int(fields["length"]),
            rank=int(fields["rank"]),
            reader=None if reader == _NOBODY else reader,
        )


@dataclass(frozen=True, slots=True)
class OrderSpec:
    """A layout's positions, or its inverse.

    Attributes:
        layout: which positions each rank holds.
        length: tokens S.
        rank: whose positions; None: the row of each position among all shards.
    """

    layout: Layout
    length: int
    rank: int | None

    def numbers(self) -> tuple[int, ...]:
        """Positions of the rank's rows, pads included; or rows of all S positions."""
        if self.rank is not None:
            return self.layout.positions(self.rank, self.length)
        return self.layout.inverse(self.length)[: self.length]

    def __str__(self) -> str:
        layout, rank = self.layout, _NOBODY if self.rank is None else self.rank
        size = f"cp_size={layout.cp_size} length={self.length}"
        return f"{_ORDER}{layout.key} {size} rank={rank}"

    @classmethod
    def parse(cls, text: str) -> "OrderSpec":
        """Read back what ``str`` gave."""
        fields = dict(field.split("=") for field in text.split(" "))
        rank = int(fields["rank"])
        return cls(
            Layout.parse(fields["order"], int(fields["cp_size"])),
            length=int(fields["length"]),
            rank=None if rank == _NOBODY else rank,
        )


def find_selected(spec: TableSpec, device: torch.device) -> Table | Residues:
    """The selected rows: by arithmetic if that gives them, else as a table.

    Heads that select fewer than others have absent rows.
    """
    text = str(spec)
    rows, shard = _rows(text), Rows((0, 0), (spec.layout.chunks_per_rank, 0))
    shard_size = spec.layout.shard_size(spec.length)
    firsts = spec.find_firsts()
    if firsts is not None:
        return Residues(
            firsts=_spell_firsts(spec, firsts, device),
            base=min(firsts),
            rate=spec.selection.rate,
            count=len(rows[0]),
            heads=len(rows),
            shard=shard,
            shard_size=shard_size,
        )
    return Table(
        index=ops.ROW_TABLE(text, device=device),
        count=len(_padded_rows(text)[0]),
        shard=shard,
        shard_size=shard_size,
        wire=Wire(text, sum(map(len, rows)), device),
    )


def _spell_firsts(
    spec: TableSpec, firsts: tuple[int, ...], device: torch.device
) -> Tensor:
    """Each head's first row: one behind the other by arithmetic, which fuses."""
    base, rate = min(firsts), spec.selection.rate
    start = firsts[0] - base
    for step in (0, 1):
        if firsts == tuple(
            base + (start + step * h) % rate for h in range(len(firsts))
        ):
            heads = torch.arange(len(firsts), device=device)
            return base + (start + step * heads) % rate
    table: Tensor = ops.ROW_TABLE(_FIRSTS + str(spec), device=device)
    return table[0]


def find_runs(
    runs: Sequence[Rows], chunk: int, layout: Layout, device: torch.device
) -> Table:
    """Several runs of a shard's rows as a table for all heads."""
    ends = [run.resolve(chunk) for run in runs]
    text = _RUNS + ",".join(f"{start}:{stop}" for start, stop in ends)
    return Table(
        index=ops.ROW_TABLE(text, device=device),
        count=sum(stop - start for start, stop in ends),
        shard=Rows((0, 0), (layout.chunks_per_rank, 0)),
        shard_size=chunk * layout.chunks_per_rank,
        wire=None,
    )


_Rows = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=1024)
def _rows(text: str) -> _Rows:
    """The rows of each head."""
    if text.startswith(_RUNS):
        runs = (run.split(":") for run in text.removeprefix(_RUNS).split(","))
        return (tuple(row for a, b in runs for row in range(int(a), int(b))),)
    if text.startswith(_ORDER):
        return (OrderSpec.parse(text).numbers(),)
    with outside_tracing():  # the plan computes with tensors
        return TableSpec.parse(text).rows()


@lru_cache(maxsize=1024)
def _padded_rows(text: str) -> _Rows:
    """The rows of each head, filled up with -1 to the same count, at least one."""
    if text.startswith(PRESENT):
        return (_find_present(text.removeprefix(PRESENT)),)
    if text.startswith(PLACES):
        return _find_places(text.removeprefix(PLACES))
    if text.startswith(_FIRSTS):
        return (tuple(head[0] for head in _rows(text.removeprefix(_FIRSTS))),)
    rows = _rows(text)
    longest = max(1, *map(len, rows))
    return tuple((*head, *(-1 for _ in range(longest - len(head)))) for head in rows)


def _find_present(text: str) -> tuple[int, ...]:
    """Which rows of the padded table, counted over all heads, are none of the -1."""
    flat = (row for head in _padded_rows(text) for row in head)
    return tuple(n for n, row in enumerate(flat) if row >= 0)


def _find_places(text: str) -> _Rows:
    """How many such rows come before each row of the padded table; 0 for a -1."""
    number = count()
    return tuple(
        tuple(next(number) if row >= 0 else 0 for row in head)
        for head in _padded_rows(text)
    )


@lru_cache(maxsize=256)
def _make_table(text: str) -> Tensor:
    return prepare_upload(torch.tensor(_padded_rows(text), dtype=torch.int64))


def _row_table(text: str, *, device: torch.device) -> Tensor:
    return upload(_make_table(text), device)


def _row_table_shape(text: str, *, device: torch.device) -> Tensor:
    rows = _padded_rows(text)
    return torch.empty((len(rows), len(rows[0])), dtype=torch.int64, device=device)


ops.LIBRARY.impl("row_table", _row_table, "CompositeExplicitAutograd")
torch.library.register_fake("ringcompile::row_table", _row_table_shape, lib=ops.LIBRARY)
