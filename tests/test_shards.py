"""``shard`` and ``unshard`` by hand."""

import pytest
import torch
from support.ranks import RankPool
from torch.distributed import ProcessGroup

from ringcompile import OptionError, shard, unshard

LENGTH = 11


def there_and_back(
    group: ProcessGroup, rank: int, layout: str, segment: int | None = None
) -> list[float]:
    x = torch.arange(2.0 * LENGTH * 3).view(2, LENGTH, 3).requires_grad_()
    rows = shard(x, 1, group, layout=layout, segment=segment)
    whole = unshard(rows, -2, group, layout=layout, segment=segment, length=LENGTH)
    assert torch.equal(whole, x)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((whole * weights).sum(), x)
    assert torch.equal(grad, weights)
    with pytest.raises(OptionError, match="are no such sequence"):
        unshard(rows, 1, group, layout=layout, segment=segment, length=4 * LENGTH)
    return (rows[0, :, 0] / 3).tolist()


def test_ranks_hold_their_rows_and_join_them(ranks: RankPool) -> None:
    held = {
        layout: ranks.run(there_and_back, layout, world_size=2)
        for layout in ("contiguous", "zigzag", "striped")
    }
    # 11 tokens and a pad, which repeats the last one.
    assert held == {
        "contiguous": [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 10]],
        "zigzag": [[0, 1, 2, 9, 10, 10], [3, 4, 5, 6, 7, 8]],
        "striped": [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 10]],
    }


def test_ranks_hold_their_parts_of_a_curve(ranks: RankPool) -> None:
    assert ranks.run(there_and_back, "hilbert", world_size=2) == [
        [0, 1, 5, 4, 8, 9],
        [10, 7, 6, 2, 3, 10],
    ]
    assert ranks.run(there_and_back, "hilbert", 4, world_size=2) == [
        [0, 2, 3, 1, 4, 6],
        [7, 5, 8, 10, 9, 10],
    ]


def test_one_rank_keeps_the_tensor() -> None:
    x = torch.ones(3, 2)
    assert shard(x, 0, layout="zigzag") is x or torch.equal(
        shard(x, 0, layout="contiguous"), x
    )
    assert unshard(x, 0, layout="contiguous") is x


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(OptionError, match="layout='zigzga'"):
        shard(torch.ones(3), 0, layout="zigzga")
    with pytest.raises(OptionError, match="dim=1"):
        shard(torch.ones(3), 1, layout="zigzag")
    with pytest.raises(OptionError, match="only hilbert has segments"):
        shard(torch.ones(3), 0, layout="zigzag", segment=2)
