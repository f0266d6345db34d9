"""bfloat16 on several ranks is no further from float64 than twice one rank's error."""

from typing import Any

import pytest
import torch
from support.compiling import compile_ring
from support.ranks import RankPool
from support.spine_models import (
    assert_step_no_worse_than_one_rank,
    build_model,
    find_model,
    run_reference,
    run_step,
)
from torch.distributed import ProcessGroup


def run_bfloat16(group: ProcessGroup, rank: int, name: str, compiler: str) -> None:
    row = find_model(name)
    inputs = row.make_inputs(row.length)
    want = run_reference(row, "sdpa", inputs)
    model = build_model(row, "sdpa", torch.bfloat16)
    ring = compile_ring(model, group, compiler=compiler)[0]
    got = run_step(model, ring, inputs)
    alone: Any = torch.compile(model, backend=compiler)
    one_rank = run_step(model, alone, inputs)
    assert_step_no_worse_than_one_rank(got, one_rank, want)


@pytest.mark.parametrize(
    ("name", "cp_size"),
    [
        pytest.param("llama", 4, marks=pytest.mark.slow),
        ("bert padded", 2),
        pytest.param("llama", 2, marks=pytest.mark.slow),
        pytest.param("bert padded", 4, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_loses_no_more_than_one_rank(
    ranks: RankPool, name: str, cp_size: int
) -> None:
    ranks.run(run_bfloat16, name, "aot_eager", world_size=cp_size)
