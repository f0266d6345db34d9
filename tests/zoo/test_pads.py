"""Padding is in no key, loss or output: whatever it holds, the bits are the same."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankPool
from support.sampling import slow
from support.spine_models import Outcome, build_model, find_model, run_step
from torch import Tensor
from torch.distributed import ProcessGroup

from ringcompile.lowering import reshard

LENGTH = 31  # three ranks, two chunks each: five rows of padding under zigzag


@contextmanager
def pads_hold_row(row: int) -> Iterator[None]:
    """Let pads hold another token than the last."""
    original = reshard.fill_pads

    def fill_pads(positions: Tensor, length: int) -> Tensor:
        return torch.where(positions < length, positions, row)

    reshard.fill_pads = fill_pads
    try:
        yield
    finally:
        reshard.fill_pads = original


def run_twice(group: ProcessGroup, rank: int, name: str, layout: str) -> list[str]:
    """Names of what differs between two contents of the padding."""
    first, second = (_run(group, name, layout, row) for row in (0, 7))
    different = [n for n, g in first.grads.items() if not _same(g, second.grads[n])]
    if not torch.equal(first.loss, second.loss):
        different.append("loss")
    if not torch.equal(first.logits, second.logits):
        different.append("logits")
    return different


def _run(group: ProcessGroup, name: str, layout: str, row: int) -> Outcome:
    torch._dynamo.reset()
    spine = find_model(name)
    model = build_model(spine, "sdpa", torch.float32)
    with pads_hold_row(row):
        call, _ = compile_ring(
            model, group, compiler="eager", options={"layout": layout}
        )
        return run_step(model, call, spine.make_inputs(LENGTH))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "zigzag"),
        slow("llama", "contiguous"),
        ("bert padded", "striped"),
        slow("llama", "striped"),
        slow("bert padded", "contiguous"),
        slow("bert padded", "zigzag"),
    ],
)
def test_padding_reaches_nothing(ranks: RankPool, name: str, layout: str) -> None:
    assert ranks.run(run_twice, name, layout, world_size=3) == [[], [], []]


def norm_without_eps(x: Tensor, w: Tensor) -> Tensor:
    """A norm of attention alone: of a row of zeros it gives NaN."""
    q = (x @ w).unflatten(-1, (2, 4)).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    y = y.transpose(1, 2).flatten(2) @ w
    return y * y.square().sum(-1, keepdim=True).rsqrt()


def run_norm(group: ProcessGroup, rank: int) -> None:
    call, record = compile_ring(norm_without_eps, group, compiler="eager")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, LENGTH, 8, generator=generator).requires_grad_()
    w = torch.randn(8, 8, generator=generator).requires_grad_()
    weight = torch.linspace(1, 2, 8)
    got, want = call(x, w), norm_without_eps(x, w)
    torch.testing.assert_close(got, want)
    ours, theirs = (
        torch.autograd.grad((y * weight).sum(), (x, w)) for y in (got, want)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(record.rings) == 1


def test_padding_makes_no_nan(ranks: RankPool) -> None:
    ranks.run(run_norm, world_size=3)
