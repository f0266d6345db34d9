"""Ranks simulated in one process: what they exchange, and misfits that must be seen."""

import pytest
import torch
from support.simulate_ranks import GROUP_NAME, SimulationError, simulate
from torch import Tensor

from ringcompile import ops
from ringcompile.torch_private import WAIT_TENSOR


def _hop(x: Tensor, dst: int, src: int, *, rows: int, tag: int = 0) -> Tensor:
    started: list[Tensor] = ops.HOP(*([x], [], dst, src, [rows], tag, GROUP_NAME, 1.0))
    return started[0]


def _wait(x: Tensor) -> Tensor:
    done: Tensor = WAIT_TENSOR(x)
    return done


def test_a_ring_of_hops_moves_rows() -> None:
    def work(rank: int) -> float:
        x = torch.full((2, 1), float(rank))
        started = _hop(x, (rank + 1) % 3, (rank - 1) % 3, rows=2)
        assert started.isnan().all()
        return float(_wait(started).sum())

    assert simulate(3, work) == [4.0, 0.0, 2.0]


def test_collectives_gather_and_sum() -> None:
    def work(rank: int) -> tuple[list[float], float]:
        x = torch.tensor([rank + 1.0])
        gathered = _wait(ops.ALL_GATHER(x, 2, 0, GROUP_NAME, 1.0))
        (total,) = ops.ALL_REDUCE([x], 1, GROUP_NAME, 1.0)
        return gathered.flatten().tolist(), float(total)

    assert simulate(2, work) == [([1.0, 2.0], 3.0)] * 2


def test_another_order_of_tags_is_seen() -> None:
    def work(rank: int) -> None:
        x = torch.ones(1)
        for tag in (0, 1) if rank else (1, 0):
            ops.ALL_REDUCE([x], tag, GROUP_NAME, 1.0)

    with pytest.raises(SimulationError, match="call 0 is all_reduce"):
        simulate(2, work)


def test_a_rank_that_ends_early_is_seen() -> None:
    def work(rank: int) -> None:
        if rank == 0:
            _wait(ops.ALL_GATHER(torch.ones(1), 2, 0, GROUP_NAME, 1.0))

    with pytest.raises(SimulationError, match="has ended after 0 calls"):
        simulate(2, work)


def test_a_call_that_nobody_waits_for_is_seen() -> None:
    def work(rank: int) -> None:
        if rank == 0:
            ops.ALL_GATHER(torch.ones(1), 2, 0, GROUP_NAME, 1.0)

    with pytest.raises(SimulationError, match="rank 0 called"):
        simulate(2, work)


def test_a_hop_to_the_wrong_rank_is_seen() -> None:
    def work(rank: int) -> None:
        _wait(_hop(torch.ones(1, 1), (rank + 1) % 3, (rank + 1) % 3, rows=1))

    with pytest.raises(SimulationError, match="does not go to rank"):
        simulate(3, work)


def test_rows_that_do_not_fit_are_seen() -> None:
    def work(rank: int) -> None:
        _wait(_hop(torch.ones(1, 1), 1 - rank, 1 - rank, rows=2))

    with pytest.raises(SimulationError, match="expected"):
        simulate(2, work)


def test_the_first_error_of_a_rank_is_raised() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise ValueError("rank 1 fails")
        _wait(ops.ALL_GATHER(torch.ones(1), 2, 0, GROUP_NAME, 1.0))

    with pytest.raises(ValueError, match="rank 1 fails"):
        simulate(2, work)
