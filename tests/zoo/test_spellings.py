"""Every spelling of attention becomes a ring and equals eager float64, at any place.

CI runs all of them on 2 ranks without Inductor. By hand, the rest:

    pytest -q -m slow tests/zoo/test_spellings.py
"""

import warnings

import pytest
import torch
from support.compiling import Record, compile_ring
from support.ranks import RankPool
from support.spelling_runs import find_faults, run_eager, run_spelling
from support.spellings import Spelling, all_spellings, build_spelling, make_inputs
from torch.distributed import ProcessGroup

import ringcompile

ALL = all_spellings()


@pytest.mark.parametrize("spelling", ALL, ids=str)
def test_explain_says_ring(spelling: Spelling) -> None:
    model = build_spelling(spelling, torch.float32)
    inputs = make_inputs(spelling, torch.float32)
    report = ringcompile.explain(model, *inputs.values(), world_size=2)
    reasons = [a.reason for a in report.attentions if a.status != "ring"]
    assert reasons == []
    assert len(report.attentions) == spelling.num_regions
    assert [g for g in report.gathers if not g.what.startswith("output")] == []
