"""The spine on GPUs over NCCL: bfloat16, as close to float64 as one rank is.

pytest -q -m gpu tests/gpu
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.compiling import compile_ring
from support.gpus import run_on_gpus
from support.spine_models import (
    Inputs,
    Outcome,
    assert_step_no_worse_than_one_rank,
    build_model,
    find_model,
    run_reference,
    run_step,
)
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def _to_gpu(inputs: Inputs) -> Inputs:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _cpu(outcome: Outcome) -> Outcome:
    grads = {n: None if g is None else g.cpu() for n, g in outcome.grads.items()}
    return Outcome(outcome.loss.cpu(), outcome.logits.cpu(), grads)


def _check(_rank: int, name: str, length: int) -> None:
    row = find_model(name)
    inputs = row.make_inputs(length)
    want = run_reference(row, "sdpa", inputs)
    model = build_model(row, "sdpa", torch.bfloat16).cuda()
    ring, record = compile_ring(model, dist.group.WORLD)
    got = _cpu(run_step(model, ring, _to_gpu(inputs)))
    alone: Any = torch.compile(model, backend="inductor")
    one_rank = _cpu(run_step(model, alone, _to_gpu(inputs)))
    assert len(record.rings) == row.num_layers
    assert record.num_graphs == 1
    assert_step_no_worse_than_one_rank(got, one_rank, want)


@pytest.mark.parametrize(
    ("name", "length"),
    [("llama", 256), ("llama", 2048), ("llama left-padded", 256), ("bert padded", 256)],
)
def test_bfloat16_over_nccl_loses_no_more_than_one_rank(name: str, length: int) -> None:
    run_on_gpus(_check, name, length, num_ranks=2)
