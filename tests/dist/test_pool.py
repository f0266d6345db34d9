"""The pool of ranks itself: results, errors, deaths and hangs."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from support import ranks as support_ranks
from support.ranks import RankError, RankHangError, RankPool
from torch import Tensor
from torch.distributed import ProcessGroup

from ringcompile.mesh import Ranks, find_ranks


@dataclass(frozen=True)
class Point:
    x: int


def sum_of_ranks(group: ProcessGroup, rank: int, start: float) -> float:
    x = torch.tensor(start + rank)
    dist.all_reduce(x, group=group)
    return x.item()


def describe(group: ProcessGroup, rank: int) -> tuple[Ranks, Ranks, int]:
    assert rank == dist.get_rank(group)
    return find_ranks(group), find_ranks(), os.getpid()


def draw(group: ProcessGroup, rank: int) -> Tensor:
    return torch.randn(3, requires_grad=True) * 2


def move(
    group: ProcessGroup, rank: int, point: Point, x: Tensor
) -> tuple[Point, Tensor]:
    return Point(point.x + rank), x + rank


def fail_on_rank_1(group: ProcessGroup, rank: int) -> None:
    if rank == 1:
        sys.stdout.write("rank 1 was here\n")
        sys.stdout.flush()
        raise ZeroDivisionError("one is not zero")


def fail_everywhere(group: ProcessGroup, rank: int) -> None:
    raise LookupError("lost")


def leave_messages_behind(group: ProcessGroup, rank: int) -> None:
    if rank == 0:
        dist.isend(torch.full((1,), 7.0), dst=1, group=group)
    raise RuntimeError("left a message")


def swap(group: ProcessGroup, rank: int) -> float:
    x = torch.empty(1)
    send = dist.isend(torch.full((1,), float(rank)), dst=1 - rank, group=group)
    dist.recv(x, src=1 - rank, group=group)
    assert send is not None
    send.wait()
    return x.item()


def hang_on_rank_1(group: ProcessGroup, rank: int) -> None:
    if rank == 1:
        time.sleep(3600)
    dist.barrier(group=group)


def die_on_rank_1(group: ProcessGroup, rank: int) -> None:
    if rank == 1:
        os._exit(3)


def env(group: ProcessGroup, rank: int) -> tuple[int, str, str]:
    return (
        torch.get_num_threads(),
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"],
        os.environ["TORCHINDUCTOR_CACHE_DIR"],
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_back_by_rank(ranks: RankPool, world_size: int) -> None:
    total = 1.0 * world_size + sum(range(world_size))
    want = [total] * world_size
    assert ranks.run(sum_of_ranks, 1.0, world_size=world_size) == want


def test_group_is_a_sub_world_and_default_group_is_all(ranks: RankPool) -> None:
    results = ranks.run(describe, world_size=3)
    assert [own.rank for own, _, _ in results] == [0, 1, 2]
    assert {own.size for own, _, _ in results} == {3}
    assert [(all_.rank, all_.size) for _, all_, _ in results] == [
        (0, 4),
        (1, 4),
        (2, 4),
    ]
    assert ranks.run(describe, world_size=1)[0][0] == Ranks()


def test_one_pool_serves_all_jobs(ranks: RankPool) -> None:
    pids = [result[2] for result in ranks.run(describe)]
    assert [result[2] for result in ranks.run(describe)] == pids
    assert os.getpid() not in pids


def test_arguments_and_results_are_copied(ranks: RankPool) -> None:
    results = ranks.run(move, Point(3), torch.ones(2), world_size=2)
    assert [point for point, _ in results] == [Point(3), Point(4)]
    assert [x.tolist() for _, x in results] == [[1.0, 1.0], [2.0, 2.0]]


def test_every_job_starts_from_the_same_seed(ranks: RankPool) -> None:
    first, second = ranks.run(draw), ranks.run(draw)
    for x in (*first, *second):
        assert torch.equal(x, first[0])


def test_ranks_use_one_thread_and_a_cache_of_this_run(ranks: RankPool) -> None:
    results = ranks.run(env)
    assert {r[:2] for r in results} == {(1, "1")}
    assert len({r[2] for r in results}) == 1
    assert "ringcompile-ranks-" in results[0][2]


def test_an_error_brings_its_traceback_and_the_pool_lives_on(ranks: RankPool) -> None:
    pids = [result[2] for result in ranks.run(describe)]
    with pytest.raises(RankError) as caught:
        ranks.run(fail_on_rank_1)
    text = str(caught.value)
    assert "rank 1 of 2 raised:\nTraceback" in text
    assert "in fail_on_rank_1" in text
    assert "ZeroDivisionError: one is not zero" in text
    assert "rank 1 printed:\nrank 1 was here" in text
    assert "rank 0 of 2" not in text
    assert [result[2] for result in ranks.run(describe)] == pids


def test_equal_errors_are_told_once(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="rank 0, 1, 2 of 3 raised:") as caught:
        ranks.run(fail_everywhere, world_size=3)
    assert str(caught.value).count("LookupError: lost") == 1


def test_messages_of_a_failed_job_reach_no_later_one(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="left a message"):
        ranks.run(leave_messages_behind)
    assert ranks.run(swap) == [1.0, 0.0]


def test_functions_must_be_importable_by_ranks(ranks: RankPool) -> None:
    with pytest.raises(ValueError, match="module-level"):
        ranks.run(lambda group, rank: rank)


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[RankPool]:
    """An own pool of two: these tests kill it."""
    monkeypatch.setattr(support_ranks, "GRACE_S", 1.0)
    pool = RankPool(num_ranks=2)
    yield pool
    pool.close()


@pytest.mark.dist
def test_hangs_and_deaths_are_told_and_the_pool_restarts(small_pool: RankPool) -> None:
    with pytest.raises(RankHangError) as caught:
        small_pool.run(hang_on_rank_1, timeout_s=3.0)
    text = str(caught.value)
    assert "rank 0 did not answer within 3 s" in text
    assert "rank 1 did not answer within 3 s" in text
    assert "in hang_on_rank_1" in text.split("stacks of rank 0")[1]
    assert "in hang_on_rank_1" in text.split("stacks of rank 1")[1]
    assert not small_pool.is_running

    with pytest.raises(RankError, match="rank 1 died with exit status 3"):
        small_pool.run(die_on_rank_1)
    assert not small_pool.is_running

    assert small_pool.run(swap) == [1.0, 0.0]
