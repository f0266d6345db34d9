from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import layouts

from ringcompile.ir.layout import Layout
from ringcompile.ir.schedule import Selection
from ringcompile.plan.selection import selected_rows

selections = st.builds(
    Selection,
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([(0, 1, 2, 3), (0, 0, 1, None), (None, 1, 1, 0)]),
    st.sampled_from([1, 2, 4]),
)


@settings(deadline=None, max_examples=40)
@given(selections, layouts(5), st.integers(1, 60))
def test_query_rows_are_those_of_the_formula(
    s: Selection, layout: Layout, length: int
) -> None:
    for rank in range(layout.cp_size):
        at = layout.positions(rank, length)
        rows = selected_rows(s, at, length=length)
        for offset, head in zip(s.offsets, rows, strict=True):
            want = [
                n
                for n, p in enumerate(at)
                if p < length and p % s.segment % s.rate == offset
            ]
            assert list(head) == want


@settings(deadline=None, max_examples=40)
@given(selections, layouts(5), st.integers(1, 60))
def test_kv_rows_are_the_union_in_shared_segments(
    s: Selection, layout: Layout, length: int
) -> None:
    readers = [p for p in layout.positions(0, length) if p < length]
    segments = {p // s.segment for p in readers}
    for rank in range(layout.cp_size):
        at = layout.positions(rank, length)
        rows = selected_rows(
            s, at, length=length, for_positions=layout.positions(0, length)
        )
        by_head = selected_rows(s, at, length=length)
        shared = 4 // s.num_kv_heads
        for g, group in enumerate(rows):
            union = set().union(*by_head[g * shared : (g + 1) * shared])
            assert set(group) == {n for n in union if at[n] // s.segment in segments}
            assert list(group) == sorted(group)
