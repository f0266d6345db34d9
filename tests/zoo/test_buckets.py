"""Gradients of many parameters: summed over the ranks in few collectives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankPool
from support.tolerances import assert_gradients_equal
from torch import Tensor, nn
from torch.distributed import ProcessGroup

WIDTH = 8


class Scaled(nn.Module):
    """An attention of what many parameters scale, those frozen that say so."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        scales = torch.randn(num_parameters, WIDTH, generator=generator)
        self.scales = nn.ParameterList(nn.Parameter(1 + 0.1 * x) for x in scales)
        self.scales[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = x * scale
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def check(group: ProcessGroup, _rank: int, num_parameters: int, num_sums: int) -> None:
    model = Scaled(num_parameters).double()  # products of 70 round by 2e-5 otherwise
    reference = copy.deepcopy(model)
    call, record = compile_ring(model, group, compiler="aot_eager")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 12, WIDTH, generator=generator, dtype=torch.float64)
    call(x).square().sum().backward()
    reference(x).square().sum().backward()
    assert_gradients_equal(
        {n: p.grad for n, p in model.named_parameters()},
        {n: p.grad for n, p in reference.named_parameters()},
    )
    assert record.text.count("ringcompile.spread") == num_sums


@pytest.mark.parametrize(("num_parameters", "num_sums"), [(33, 1), (34, 2), (70, 3)])
def test_no_sum_has_more_than_32(
    ranks: RankPool, num_parameters: int, num_sums: int
) -> None:
    ranks.run(check, num_parameters, num_sums, world_size=2)
