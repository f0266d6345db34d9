"""Rows of shards: spans, tables and running values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.layout import Layout
from ringcompile.ir.schedule import Rows, Selection
from ringcompile.lowering.rows import Residues, Segments, Span, Values
from ringcompile.lowering.selected import TableSpec, find_selected

CPU = torch.device("cpu")


def rows(start: int, stop: int) -> Rows:
    return Rows((0, start), (0, stop))


def add(a: Values, b: Values) -> Values:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def zeros(count: object) -> Values:
    assert isinstance(count, int)
    return (torch.zeros(1, 1, count),)


spans = st.lists(
    st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda s: s[0] < s[1]),
    max_size=6,
)


@given(spans=spans)
def test_segments_sum_what_was_added(spans: list[tuple[int, int]]) -> None:
    want = torch.zeros(1, 1, 12)
    total = Segments([rows(0, 12), *(rows(*s) for s in spans)], 12, combine=add)
    for n, (start, stop) in enumerate(spans):
        value = torch.arange(1.0, stop - start + 1).view(1, 1, -1) * (n + 1)
        total.add(rows(start, stop), (value,))
        want[:, :, start:stop] += value
    (got,) = total.join(zeros)
    assert torch.equal(got, want)


def test_edges_in_chunks_and_in_rows_meet() -> None:
    whole = Rows((0, 0), (2, 0))
    total = Segments([whole, rows(0, 12)], 6, combine=add)
    total.add(rows(0, 12), (torch.ones(1, 1, 12),))
    total.add(whole, (torch.ones(1, 1, 12),))
    (got,) = total.join(zeros)
    assert got.tolist() == [[[2.0] * 12]]


def test_a_span_takes_and_places() -> None:
    x = torch.arange(24.0).view(1, 1, 12, 2)
    span = Span(Rows((1, -1), (1, 2)), 6)
    assert span.count == 3
    assert torch.equal(span.take(x), x[:, :, 5:8])
    assert span.positions(torch.arange(12) * 2).tolist() == [[10, 12, 14]]
    assert span.place((x,)) == (span.rows, (x,))
    assert span.own_rows == Rows((0, 0), (0, 3))


SELECTION = Selection(segment=8, rate=2, offsets=(0, 1, None, 0), num_kv_heads=2)


@pytest.mark.parametrize("reader", [None, 0, 1])
def test_table_specs_are_read_back(reader: int | None) -> None:
    spec = TableSpec(SELECTION, Layout("zigzag", 2), 27, 1, reader)
    assert TableSpec.parse(str(spec)) == spec


def test_a_table_takes_the_selected_rows_of_each_head() -> None:
    layout = Layout("contiguous", 2)
    table = find_selected(TableSpec(SELECTION, layout, 15, 1, None), CPU)
    # Rank 1 holds 8 .. 15, and 15 is padding.
    assert table.index.tolist() == [[0, 2, 4, 6], [1, 3, 5, -1], [-1] * 4, [0, 2, 4, 6]]
    x = torch.arange(4 * 8.0).view(1, 4, 8, 1)
    assert table.take(x)[0, 1, :3, 0].tolist() == [9.0, 11.0, 13.0]
    positions = table.positions(torch.arange(8, 16))
    assert positions[1].tolist() == [9, 11, 13, -1]
    where, (placed, lse) = table.place((table.take(x) + 1, torch.ones(1, 4, 4)))
    assert where == Rows((0, 0), (1, 0))
    assert placed[0, 1, :, 0].tolist() == [0, 10, 0, 12, 0, 14, 0, 0]
    assert placed[0, 2].tolist() == [[0.0]] * 8
    inf = torch.inf
    assert lse[0, 1].tolist() == [-inf, 1, -inf, 1, -inf, 1, -inf, -inf]


def test_kv_rows_are_those_of_the_readers_segments() -> None:
    layout = Layout("contiguous", 2)
    selection = Selection(segment=12, rate=2, offsets=(0, 0), num_kv_heads=1)
    table = find_selected(TableSpec(selection, layout, 16, 1, reader=0), CPU)
    # Rank 0 reads 0 .. 7, of the segment 0 .. 11; rank 1 holds 8 .. 11 of it.
    assert table.index.tolist() == [[0, 2]]


RESIDUES = {
    "a residue for each head": (Selection(8, 4, (0, 1, 2, 3), 4), 16, None),
    "a KV head's residue": (Selection(8, 4, (3, 3, 1, 1), 2), 16, 1),
    "every row": (Selection(4, 1, (0, 0), 1), 16, 1),
    "not from the first row on": (
        Selection(4, 2, (1, 0), 2, start=9, stop=15),
        16,
        None,
    ),
    "not to the last row": (Selection(4, 2, (1, 1), 1, stop=12), 16, 1),
}


@pytest.mark.parametrize("name", RESIDUES)
def test_rows_that_are_one_in_so_many_are_found_by_arithmetic(name: str) -> None:
    selection, length, reader = RESIDUES[name]
    spec = TableSpec(selection, Layout("contiguous", 2), length, 1, reader)
    rows, found = spec.rows(), find_selected(spec, CPU)
    assert isinstance(found, Residues)
    assert found.index.tolist() == [list(head) for head in rows]
    heads, count, size = len(rows), len(rows[0]), length // 2
    assert found.wire_count == heads * count
    x = torch.arange(2.0 * heads * size * 3).view(2, heads, size, 3) + 1
    taken = found.take(x)
    wanted = [x[:, h, list(head)] for h, head in enumerate(rows)]
    assert torch.equal(taken, torch.stack(wanted, 1))
    assert torch.equal(found.unpack(found.pack(taken)), taken)
    assert found.pack(taken).shape == (2, heads * count, 3)
    assert found.pack_none(x).shape == (2, 0, 3)
    at = torch.arange(8, 16)
    assert found.positions(at).tolist() == [[8 + n for n in head] for head in rows]
    where, (placed, lse) = found.place((taken, taken[..., 0]))
    assert where == Rows((0, 0), (1, 0))
    for h, head in enumerate(rows):
        others = [n for n in range(size) if n not in head]
        assert torch.equal(placed[:, h, list(head)], x[:, h, list(head)])
        assert torch.equal(lse[:, h, list(head)], x[:, h, list(head), 0])
        assert not placed[:, h, others].any()
        assert (lse[:, h, others] == -torch.inf).all()


@pytest.mark.parametrize(
    ("offsets", "takes_table"),
    [
        ((0, 1, 2, 3, 0, 1), False),
        ((3, 0, 1), False),
        ((2, 2, 2), False),
        ((2, 0, 3, 1), True),
    ],
)
def test_first_rows_one_behind_the_other_are_no_table(
    offsets: tuple[int, ...], *, takes_table: bool
) -> None:
    def find_firsts() -> Tensor:
        selection = Selection(8, 4, offsets, len(offsets))
        spec = TableSpec(selection, Layout("contiguous", 2), 32, 1, None)
        found = find_selected(spec, CPU)
        assert isinstance(found, Residues)
        return found.firsts

    assert find_firsts().tolist() == list(offsets)
    trace = torch.fx.experimental.proxy_tensor.make_fx
    graph = trace(find_firsts, tracing_mode="fake")().graph
    targets = {n.target for n in graph.nodes}
    assert (ops.ROW_TABLE in targets) == takes_table


def test_tables_are_not_constants_of_a_graph() -> None:
    def table() -> Tensor:
        spec = TableSpec(SELECTION, Layout("striped", 2), 30, 1, 0)
        return find_selected(spec, CPU).index

    graph = torch.fx.experimental.proxy_tensor.make_fx(table, tracing_mode="fake")()
    assert [n.op for n in graph.graph.nodes] == ["call_function", "output"]
    assert torch.equal(graph(), table())
