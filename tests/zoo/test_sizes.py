"""A size read off a sharded value is the user's: the whole sequence's."""

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankPool
from torch import Tensor
from torch.distributed import ProcessGroup


def attend_and_scale(x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(x.sin(), x, x, is_causal=True)
    return y / y.shape[2] + y.new_zeros(y.shape[2])[:, None]


def run_lengths(group: ProcessGroup, rank: int, lengths: tuple[int, ...]) -> list[str]:
    call, record = compile_ring(attend_and_scale, group, compiler="eager", dynamic=True)
    for length in lengths:
        x = torch.randn(1, 2, length, 4, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(call(x), attend_and_scale(x))
    return record.gathers


@pytest.mark.parametrize("lengths", [(16, 24), (17,)])
def test_sizes_are_global(ranks: RankPool, lengths: tuple[int, ...]) -> None:
    assert ranks.run(run_lengths, lengths) == [[], []]
