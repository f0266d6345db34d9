"""Every spelling of attention becomes a ring and equals eager float64; by itself.

CI runs a sixth of the rows on 2 ranks without Inductor, and explains a third. By hand,
all rows on 2, 3 (padded) and 4 ranks:

    pytest -q -m slow tests/zoo/test_spellings.py
"""

import warnings

import pytest
import torch
from support.flex import trained_on_cpu
from support.ranks import RankPool
from support.sampling import one_in
from support.spelling_runs import make_call, run_named
from support.spellings import Spelling, all_spellings

import ringcompile

ALL = all_spellings()
NAMES = [s.name for s in ALL]

# Rows that run gathered, each with a part of the reason; "" where no attention is seen.
GATHERED = {
    # One product with V for two softmaxes: each ring holds its own weights only.
    "difference of weights": "weights are also used by",
}
RINGS = [s for s in ALL if s.name not in GATHERED]


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert set(GATHERED) <= set(NAMES)
    assert len(RINGS) >= 155


@pytest.mark.parametrize("spelling", one_in(4, ALL), ids=str)
def test_explain_says_what_becomes_of_it(spelling: Spelling) -> None:
    model, inputs = make_call(spelling, torch.float32)
    with warnings.catch_warnings(), trained_on_cpu():
        warnings.simplefilter("ignore")  # what is gathered is told in the report
        report = ringcompile.explain(model, *inputs.values(), world_size=2)
    reasons = [a.reason for a in report.attentions if a.status != "ring"]
    if spelling.name in GATHERED:
        because = GATHERED[spelling.name]
        assert bool(report.attentions) is bool(because)
        assert len(reasons) == len(report.attentions)
        assert all(because in reason for reason in reasons)
        return
    assert reasons == []
    assert len(report.attentions) == spelling.num_regions


def check_row(ranks: RankPool, spelling: Spelling, cp_size: int) -> None:
    results = ranks.run(run_named, "spelling", spelling.name, world_size=cp_size)
    for rank, (record, faults) in enumerate(results):
        assert not faults, f"rank {rank}: {faults}"
        if spelling.name not in GATHERED:
            assert record.refused == []
            assert len(record.rings) == spelling.num_regions


@pytest.mark.parametrize("spelling", ALL[::6], ids=str)
def test_a_spelling_equals_eager(ranks: RankPool, spelling: Spelling) -> None:
    check_row(ranks, spelling, 2)


@pytest.mark.parametrize("cp_size", [3, 4])
@pytest.mark.parametrize("spelling", one_in(2, ALL[1::24]), ids=str)
def test_a_spelling_on_more_ranks(
    ranks: RankPool, spelling: Spelling, cp_size: int
) -> None:
    check_row(ranks, spelling, cp_size)


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("spelling", ALL, ids=str)
def test_every_spelling(ranks: RankPool, spelling: Spelling, cp_size: int) -> None:
    check_row(ranks, spelling, cp_size)
