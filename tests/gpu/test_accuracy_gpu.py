"""How far a ring's numbers are from the true ones; ranks may share a GPU.

pytest -q -m gpu tests/gpu/test_accuracy_gpu.py
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.gpus import run_on_gpus
from torch import Tensor
from torch._inductor.utils import run_and_get_code  # noqa: TID251

import ringcompile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU"),
]

S, H, G, D = 4096, 32, 8, 128
NAMES = ("out", "dq", "dk", "dv")


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _random() -> list[Tensor]:
    """q, k, v and the gradient of out: all rows, equal on all ranks."""
    random = torch.Generator("cuda").manual_seed(0)
    options: Any = {"generator": random, "device": "cuda", "dtype": torch.bfloat16}
    return [torch.randn(1, n, S, D, **options) for n in (H, G, G, H)]


def _run_whole(dtype: torch.dtype) -> list[Tensor]:
    *inputs, grad = (x.to(dtype) for x in _random())
    inputs = [x.requires_grad_() for x in inputs]
    out = _attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def _own(x: Tensor) -> Tensor:
    return ringcompile.shard(x, 2, layout="zigzag").clone()


def _errors(found: Sequence[Tensor], true: Sequence[Tensor]) -> list[list[float]]:
    """Of each tensor the error's norm, relative, and its largest, over all ranks."""
    errors = []
    for x, y in zip(found, true, strict=True):
        wrong = x.double() - y
        squares = torch.stack([wrong.square().sum(), y.square().sum()])
        largest = wrong.abs().max()
        dist.all_reduce(squares)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        norm, size = squares.tolist()
        errors.append([(norm / size) ** 0.5, float(largest)])
    return errors


def _check(rank: int, kernel: str) -> None:
    true = [_own(x) for x in _run_whole(torch.float64)]
    alone = _errors([_own(x) for x in _run_whole(torch.bfloat16)], true)
    *inputs, grad = map(_own, _random())
    inputs = [x.requires_grad_() for x in inputs]
    options: Any = {"inputs": "sharded", "layout": "zigzag", "kernel": kernel}
    call = torch.compile(_attend, backend="ring", dynamic=True, options=options)

    def step() -> list[Tensor]:
        out = call(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    found, codes = run_and_get_code(step)
    ring = _errors(found, true)
    if rank == 0:
        for name, *both in zip(NAMES, ring, alone, strict=True):
            said = f"P = {dist.get_world_size()}, {kernel}: {name} ring, alone {both}"
            print(said)  # noqa: T201 - figures, to be seen with -s
    for (norm, largest), (wanted, wanted_largest) in zip(ring, alone, strict=True):
        assert norm <= 2 * wanted
        assert largest <= 2 * wanted_largest
    assert all("ringcompile.hop" in code for code in codes) == (
        dist.get_world_size() > 1
    )
    if kernel == "flex":
        for code in codes:
            assert "triton_tem_fused" in code
            assert "_scaled_dot_product" not in code


def _check_bits(_rank: int, kernel: str) -> None:
    """The same bits again, if asked for: cuDNN adds dq up in any order."""
    torch.use_deterministic_algorithms(mode=True)
    *inputs, grad = map(_own, _random())
    inputs = [x.requires_grad_() for x in inputs]
    options: Any = {"inputs": "sharded", "layout": "zigzag", "kernel": kernel}
    call = torch.compile(_attend, backend="ring", dynamic=True, options=options)
    runs = []
    for _ in range(3):
        out = call(*inputs)
        runs.append([out, *torch.autograd.grad(out, inputs, grad)])
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


CHECKS = {"errors": _check, "bits": _check_bits}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["auto", "flex"])
@pytest.mark.parametrize("check", CHECKS)
def test_a_ring_is_as_exact_as_one_gpu(size: int, kernel: str, check: str) -> None:
    run_on_gpus(CHECKS[check], kernel, num_ranks=size)
