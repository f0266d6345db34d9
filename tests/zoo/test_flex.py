"""flex_attention, whose block mask is passed in, becomes a ring and equals eager.

References are dense masks, worked out pair by pair. By hand, all rows on more ranks:

    pytest -q -m slow tests/zoo/test_flex.py
"""

import pytest
from support.flex_cases import TABLE
from support.ranks import RankPool
from support.spelling_runs import run_named
from support.spellings import Spelling

NAMES = [s.name for s in TABLE]
GATHERED = {"lse": "scores are also used by aten.logsumexp"}


def check_row(ranks: RankPool, spelling: Spelling, cp_size: int) -> None:
    results = ranks.run(run_named, "flex", spelling.name, world_size=cp_size)
    for rank, (record, faults) in enumerate(results):
        assert not faults, f"rank {rank}: {faults}"
        if spelling.name in GATHERED:
            (reason,) = record.refused
            assert GATHERED[spelling.name] in reason
        else:
            assert record.refused == []
            assert record.gathers == []
            assert len(record.rings) == spelling.num_regions


@pytest.mark.parametrize("number", range(len(TABLE)), ids=NAMES)
def test_flex_attention_equals_eager(ranks: RankPool, number: int) -> None:
    check_row(ranks, TABLE[number], 2 + number % 2)


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("spelling", TABLE, ids=NAMES)
def test_every_flex_attention(
    ranks: RankPool, spelling: Spelling, cp_size: int
) -> None:
    check_row(ranks, spelling, cp_size)
