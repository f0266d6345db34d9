"""Hops fly under kernels: what the profiler sees on two GPUs.

pytest -q -s -m gpu tests/gpu/test_overlap_gpu.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.gpus import run_on_gpus
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from traces import find_share, skip_first_step, split_events

import ringcompile  # noqa: F401 - the backend, in a checkout that is not installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


_STEPS = 4
_ATTENTIONS = 8  # the first hop of a backward has nothing before it to fly under


def _attend(*inputs: Tensor) -> tuple[Tensor, ...]:
    """As many as there are inputs for, as layers have them."""
    outs = []
    for q, k, v in zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True):
        torch._check(q.shape[2] == k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outs.append(out.transpose(1, 2))
    return tuple(outs)


def _check(rank: int, folder: str) -> None:
    random = torch.Generator("cuda").manual_seed(rank)
    options: Any = {"generator": random, "device": "cuda", "dtype": torch.bfloat16}
    inputs = [
        torch.randn(1, n, 8192, 128, **options).requires_grad_()
        for n in (32, 8, 8) * _ATTENTIONS
    ]
    chosen: Any = {"inputs": "sharded", "layout": "zigzag"}
    call = torch.compile(_attend, backend="ring", dynamic=True, options=chosen)

    def run() -> None:
        for _ in range(_STEPS):
            outs = call(*inputs)
            torch.autograd.grad(outs, inputs, [torch.ones_like(x) for x in outs])
        torch.cuda.synchronize()

    run()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
    path = Path(folder) / f"{rank}.json"
    profiled.export_chrome_trace(str(path))
    hops, kernels = split_events(json.loads(path.read_text())["traceEvents"])
    assert len(hops) >= 3 * _ATTENTIONS * _STEPS  # in each step KV, KV again, dKV
    hops = skip_first_step(hops, _STEPS)
    share = find_share(hops, kernels)
    print(f"rank {rank}: {len(hops)} transfers, {share:.1%} of them under kernels")  # noqa: T201
    assert share >= 0.9


def test_hops_lie_under_kernels(tmp_path: Path) -> None:
    run_on_gpus(_check, str(tmp_path), num_ranks=2)
