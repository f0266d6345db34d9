"""The rows of a shard that a dilated part selects, per head, as index tables.

Invariant: a table is made by an op when the graph runs, from a few numbers of text, so
that none is baked into the graph; both ends of a hop make the same one.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.layout import Layout
from ringcompile.ir.schedule import Rows, Selection
from ringcompile.lowering.rows import Table
from ringcompile.plan.selection import selected_rows
from ringcompile.torch_private import outside_tracing

_NOBODY = -1


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

    def __str__(self) -> str:
        selection, layout = self.selection, self.layout
        offsets = (_NOBODY if s is None else s for s in selection.offsets)
        reader = _NOBODY if self.reader is None else self.reader
        return (
            f"segment={selection.segment} rate={selection.rate}"
            f" offsets={','.join(map(str, offsets))} kv_heads={selection.num_kv_heads}"
            f" layout={layout.name} cp_size={layout.cp_size} length={self.length}"
            f" rank={self.rank} reader={reader}"
        )

    @classmethod
    def parse(cls, text: str) -> "TableSpec":
        """Read back what ``str`` gave."""
        fields = dict(field.split("=") for field in text.split(" "))
        offsets = map(int, fields["offsets"].split(","))
        reader = int(fields["reader"])
        return cls(
            Selection(
                segment=int(fields["segment"]),
                rate=int(fields["rate"]),
                offsets=tuple(None if s == _NOBODY else s for s in offsets),
                num_kv_heads=int(fields["kv_heads"]),
            ),
            Layout(fields["layout"], int(fields["cp_size"])),
            length=int(fields["length"]),
            rank=int(fields["rank"]),
            reader=None if reader == _NOBODY else reader,
        )


def find_selected(spec: TableSpec, device: torch.device) -> Table:
    """The selected rows as a table; heads that select fewer have absent rows."""
    text = str(spec)
    chunks = spec.layout.chunks_per_rank
    return Table(
        index=ops.ROW_TABLE(text, device=device),
        count=len(_padded_rows(text)[0]),
        shard=Rows((0, 0), (chunks, 0)),
        shard_size=spec.layout.shard_size(spec.length),
    )


@lru_cache(maxsize=1024)
def _padded_rows(text: str) -> tuple[tuple[int, ...], ...]:
    """The rows of each head, filled up with -1 to the same count, at least one."""
    with outside_tracing():  # the plan computes with tensors
        rows = TableSpec.parse(text).rows()
    count = max(1, *map(len, rows))
    return tuple((*head, *(-1 for _ in range(count - len(head)))) for head in rows)


def _row_table(text: str, *, device: torch.device) -> Tensor:
    return torch.tensor(_padded_rows(text), device=device)


def _row_table_shape(text: str, *, device: torch.device) -> Tensor:
    rows = _padded_rows(text)
    return torch.empty((len(rows), len(rows[0])), dtype=torch.int64, device=device)


ops.LIBRARY.impl("row_table", _row_table, "CompositeExplicitAutograd")
torch.library.register_fake("ringcompile::row_table", _row_table_shape, lib=ops.LIBRARY)
