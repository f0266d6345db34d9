"""What only looks like attention over the sequence is left alone, and stays right."""

import pytest
from support.lookalikes import LOOKALIKES, OTHER_AXES
from support.ranks import RankPool
from support.sampling import one_in
from support.spelling_runs import run_named


@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_lookalike_is_no_attention(ranks: RankPool, name: str) -> None:
    for record, faults in ranks.run(run_named, "alone", name):
        assert not faults
        assert record.rings == []
        assert record.refused == []


@pytest.mark.parametrize("name", one_in(3, LOOKALIKES))
def test_a_lookalike_beside_attention(ranks: RankPool, name: str) -> None:
    for record, faults in ranks.run(run_named, "beside", name):
        assert not faults
        assert len(record.rings) == 2
        assert record.refused == []


@pytest.mark.parametrize("table", ["alone", "beside"])
@pytest.mark.parametrize("name", OTHER_AXES)
def test_attention_over_another_axis_is_right(
    ranks: RankPool, name: str, table: str
) -> None:
    """By itself it is as good as one over the sequence: (S, B, E) is a layout too."""
    for record, faults in ranks.run(run_named, table, name):
        assert not faults
        assert len(record.rings) >= (2 if table == "beside" else 0)
