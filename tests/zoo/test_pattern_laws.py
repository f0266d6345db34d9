"""What must hold of every pattern whatever its numbers, on gloo ranks (float32)."""

import pytest
import torch
from support.pattern_cases import CASES
from support.pattern_runs import Cell, compile_cell
from support.ranks import RankPool
from torch import Tensor
from torch.distributed import ProcessGroup

from ringcompile.ir.layout import LAYOUTS

CHANGED = (4, 21, 40)  # the last has few readers, the others some on each rank


def run_laws(group: ProcessGroup, _rank: int, cells: tuple[Cell, ...]) -> None:
    """Check all laws of each cell on this rank."""
    for cell in cells:
        call = compile_cell(group, cell)
        q, k, v, _ = cell.tensors()
        H, G = cell.heads
        counts = CASES[cell.name].count(H, G, cell.length, is_causal=cell.is_causal)
        with torch.no_grad():
            out = call(q, k, v)
            ones = call(q, k, torch.ones_like(v))
            check_ones(ones * CASES[cell.name].divisor, counts)
            for t in CHANGED:
                changed = call(*(change(x, t) for x in (q, k, v)))
                check_changes(out, changed, counts, t)
            for b in range(2):
                alone = call(q[b : b + 1], k[b : b + 1], v[b : b + 1])
                assert torch.equal(alone[0], out[b]), (cell, "batch", b)


def check_ones(out: Tensor, counts: Tensor) -> None:
    """Values all 1 give 1 within 4 ulp where there is a key, and exactly 0 elsewhere."""
    is_covered = (counts.sum(-1) > 0)[None, :, :, None].expand_as(out)
    assert (out[is_covered] - 1).abs().max() <= 4 * torch.finfo(out.dtype).eps
    assert not out[~is_covered].any()


def check_changes(before: Tensor, after: Tensor, counts: Tensor, t: int) -> None:
    """Another token t changes the rows that see it and its own, and no bit else."""
    expected = counts[:, :, t] > 0
    expected[:, t] |= counts[:, t].sum(-1) > 0
    found = (before != after).any(-1)
    assert torch.equal(found, expected.expand_as(found)), t


def change(x: Tensor, t: int) -> Tensor:
    x = x.clone()
    x[:, :, t] = x[:, :, t] * -1.5 + 0.25
    return x


def check(ranks: RankPool, cells: list[Cell], cp_size: int) -> None:
    ranks.run(run_laws, tuple(cells), world_size=cp_size)


def cells_of(number: int) -> list[Cell]:
    """Both masks, each on another layout."""
    name = list(CASES)[number]
    return [
        Cell(name, is_causal, LAYOUTS[(number + is_causal) % len(LAYOUTS)])
        for is_causal in (True, False)
    ]


def test_laws_hold(ranks: RankPool) -> None:
    """One mask of each pattern."""
    cells = [cells_of(number)[number % 2] for number in range(len(CASES))]
    check(ranks, cells, 2)


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_laws_hold_everywhere(ranks: RankPool, number: int, cp_size: int) -> None:
    check(ranks, cells_of(number), cp_size)
