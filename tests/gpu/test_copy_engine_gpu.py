"""Hops by copies: what was sent arrives, the bits that NCCL brings, in any sizes.

pytest -q -m gpu tests/gpu/test_copy_engine_gpu.py
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.gpus import has_sends, run_on_gpus
from torch import Tensor

import ringcompile
from ringcompile import ops
from ringcompile.lowering.transports import copy_engine
from ringcompile.lowering.transports.choose import prepare_transport
from ringcompile.mesh import Ranks
from ringcompile.torch_private import WAIT_TENSOR

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU"),
]

# Rows, heads, features: odd, tiny, and more than all places of a buffer hold.
SIZES = [(1, 1, 1), (517, 3, 33), (4096, 8, 128), (90000, 16, 128)]


def _hop(xs: list[Tensor], dst: int, src: int, rows: int, road: str) -> list[Tensor]:
    assert dist.group.WORLD is not None
    place = (0, dist.group.WORLD.group_name, 60.0, road)
    started = ops.HOP(xs, [], dst, src, [rows] * len(xs), *place)
    memories = {x.untyped_storage().data_ptr() for x in started if x.numel()}
    assert len(memories) in {0, len(xs)}  # or torch refuses the op, if CI is set
    return [WAIT_TENSOR(x) for x in started]


def _draw(
    rank: int, seed: int, shape: tuple[int, ...], dtype: torch.dtype
) -> list[Tensor]:
    """What a rank sends, known to all."""
    random = torch.Generator("cuda").manual_seed(1000 * rank + seed)
    options: Any = {"generator": random, "device": "cuda", "dtype": dtype}
    return [torch.randn(shape, **options) for _ in range(2)]


def _check_hops(rank: int) -> None:
    assert dist.group.WORLD is not None
    name, size = dist.group.WORLD.group_name, dist.get_world_size()
    with patch.object(copy_engine, "_BUDGET", 512 * 2**20):  # so that SIZES exceed it
        prepare_transport(
            "copy_engine", Ranks(rank, size, name), [torch.ones(1).cuda()]
        )
    roads = ROADS if has_sends() else ROADS[1:]
    dst, src = (rank + 1) % size, (rank - 1) % size
    for seed, (rows, heads, features) in enumerate(SIZES * 3):
        for dtype in (torch.bfloat16, torch.float32):
            shape = (1, heads, rows, features)
            xs = _draw(rank, seed, shape, dtype)
            want = _draw(src, seed, shape, dtype)
            for road in roads:
                got = _hop(xs, dst, src, rows, road)
                assert all(map(torch.equal, got, want))
            # From the first rank to the second alone.
            sent = xs if rank == 0 else [x[:, :, :0] for x in xs]
            ends = {0: (1, -1, 0), 1: (-1, 0, rows)}.get(rank, (-1, -1, 0))
            for road in roads:
                got = _hop(sent, *ends, road)
                if rank == 1:
                    assert all(map(torch.equal, got, _draw(0, seed, shape, dtype)))
                else:
                    assert all(x.shape[2] == 0 for x in got)


ROADS = ("p2p", "copy_engine")


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Twice: under the one ring's backward fly the other's first hops."""
    for _ in range(2):
        q = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return q


def _check_rings(rank: int) -> None:
    """Each road, and CUDA graphs, give the same bits; so does a second run."""
    torch.use_deterministic_algorithms(mode=True)  # cuDNN adds dq up in any order
    random = torch.Generator("cuda").manual_seed(0)
    options: Any = {"generator": random, "device": "cuda", "dtype": torch.bfloat16}
    whole = [torch.randn(1, n, 1536, 64, **options) for n in (4, 2, 2, 4)]
    q, k, v, grad = (ringcompile.shard(x, 2, layout="zigzag").clone() for x in whole)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = []
    roads: list[dict[str, Any]] = [
        {"transport": "p2p"},
        {"transport": "copy_engine"},
        {"inductor": {"triton.cudagraphs": True}},
    ]
    for given in roads if has_sends() else roads[1:]:
        torch.compiler.reset()
        chosen: Any = {"inputs": "sharded", "layout": "zigzag"} | given
        call = torch.compile(_attend, backend="ring", dynamic=True, options=chosen)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            out = call(*inputs)
            grads = torch.autograd.grad(out, inputs, grad)
            found.append([x.clone() for x in (out.detach(), *grads)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    wide = [x.double().requires_grad_() for x in whole[:3]]
    want = _attend(*wide)
    true = [want, *torch.autograd.grad(want, wide, whole[3].double())]
    for x, y in zip(found[0], true, strict=True):
        mine = ringcompile.shard(y.detach(), 2, layout="zigzag")
        assert (x.double() - mine).norm() < 0.01 * mine.norm()


CHECKS = {"hops": _check_hops, "rings": _check_rings}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("check", CHECKS)
def test_copies_bring_what_was_sent(check: str, size: int) -> None:
    run_on_gpus(CHECKS[check], num_ranks=size)
