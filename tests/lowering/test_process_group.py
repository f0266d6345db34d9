"""Hops and collectives on gloo, and what their waits say when a peer does not answer."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from expecttest import assert_expected_inline
from support.ranks import RankError, RankPool
from torch import Tensor
from torch.distributed import ProcessGroup

import ringcompile.lowering  # noqa: F401
from ringcompile import ops
from ringcompile.errors import TransportError
from ringcompile.lowering.hops import Phase, Tag, reshard_tag
from ringcompile.lowering.transports.process_group import TimedWork, _Place, _Transfer
from ringcompile.torch_private import WAIT_TENSOR, Work

TAG = Tag(3, Phase.BACKWARD_DKV, 2)


def hop_around(group: ProcessGroup, rank: int, dtype: torch.dtype) -> list[Tensor]:
    P = group.size()
    x = torch.full((1, 2, 4, 3), rank, dtype=dtype)
    sent = [x, (x + 10).mT]  # the second is not contiguous
    args = (
        (rank + 1) % P,
        (rank - 1) % P,
        [4, 3],
        TAG.encode(),
        group.group_name,
        60.0,
    )
    return [WAIT_TENSOR(y) for y in ops.HOP(sent, [], *args)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_hop_brings_the_neighbours_rows(ranks: RankPool, dtype: torch.dtype) -> None:
    for rank, (x, y) in enumerate(ranks.run(hop_around, dtype, world_size=3)):
        assert x.shape == (1, 2, 4, 3)
        assert y.shape == (1, 2, 3, 4)
        assert set(x.flatten().tolist()) == {(rank - 1) % 3}
        assert set(y.flatten().tolist()) == {(rank - 1) % 3 + 10}


def hop_one_way(group: ProcessGroup, rank: int) -> Tensor:
    rows = torch.arange(6.0).view(1, 1, 3, 2)
    args = (TAG.encode(), group.group_name, 60.0)
    if rank == 0:
        (got,) = ops.HOP([rows[:, :, 1:]], [], 1, -1, [0], *args)
    elif rank == 1:
        (got,) = ops.HOP([rows[:, :, :0]], [], -1, 0, [2], *args)
    else:
        (got,) = ops.HOP([rows[:, :, :0]], [], -1, -1, [0], *args)
    arrived: Tensor = WAIT_TENSOR(got)
    return arrived


def test_a_hop_may_have_no_rows(ranks: RankPool) -> None:
    sent, received, idle = ranks.run(hop_one_way, world_size=3)
    assert sent.shape == idle.shape == (1, 1, 0, 2)
    assert received.tolist() == [[[[2.0, 3.0], [4.0, 5.0]]]]


def collect(group: ProcessGroup, rank: int) -> tuple[Tensor, list[Tensor]]:
    x = torch.full((2, 3), float(rank))
    name, P = group.group_name, group.size()
    gathered = WAIT_TENSOR(ops.ALL_GATHER(x.T, P, reshard_tag("gather"), name, 60.0))
    sums = ops.ALL_REDUCE([x, x.double(), x[0] + 1], reshard_tag("spread"), name, 60.0)
    return gathered, sums


def test_collectives(ranks: RankPool) -> None:
    for gathered, sums in ranks.run(collect, world_size=3):
        assert gathered.shape == (3, 3, 2)
        assert gathered[:, 0, 0].tolist() == [0.0, 1.0, 2.0]
        assert [s.dtype for s in sums] == [torch.float32, torch.float64, torch.float32]
        assert [s.unique().tolist() for s in sums] == [[3.0], [3.0], [6.0]]
        assert sums[2].shape == (3,)


TIMEOUT_S = 2.0


def hop_with_a_stopped_peer(group: ProcessGroup, rank: int) -> None:
    if rank == 1:
        wake = f"sleep {2.5 * TIMEOUT_S}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", wake])
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    with in_time():
        tag = Tag(7, Phase.FORWARD_KV, 1).encode()
        args = (1, 1, [3], tag, group.group_name, TIMEOUT_S)
        WAIT_TENSOR(ops.HOP([torch.ones(1, 1, 3, 2)], [], *args)[0])


def gather_with_a_stopped_peer(group: ProcessGroup, rank: int) -> None:
    if rank == 1:
        time.sleep(2 * TIMEOUT_S)
        return
    with in_time():
        args = (2, reshard_tag("gather"), group.group_name, TIMEOUT_S)
        WAIT_TENSOR(ops.ALL_GATHER(torch.ones(2), *args))


@contextmanager
def in_time() -> Iterator[None]:
    """Require an end within 2x the limit."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - start
        assert seconds < 2 * TIMEOUT_S, f"took {seconds} s"


# An error leaves the rank in these, so that the pool makes its groups anew.


def test_a_stopped_peer_raises_in_time_and_by_name(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(hop_with_a_stopped_peer, world_size=2)
    text = str(caught.value)
    assert "rank 0 of 2 raised" in text
    assert "rank 1 did not finish within timeout_s=2" in text
    assert "at: rank 0, attention 7, forward KV, step 1" in text


def test_a_collective_raises_in_time_too(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(gather_with_a_stopped_peer, world_size=2)
    text = str(caught.value)
    assert "all-gather did not finish within timeout_s=2" in text
    assert "at: rank 0, reshard (gather)" in text


class BrokenWork(Work):
    def wait(self, timeout: timedelta | None = None) -> bool:
        raise RuntimeError("[/gloo/pair.cc:553] Connection closed by peer [::1]:47")


def test_a_dead_peer_is_named() -> None:
    transfers = [_Transfer(BrokenWork(), "receive from rank 2")]
    work = TimedWork(_Place(1, TAG.encode(), 600.0), transfers, [])
    with pytest.raises(TransportError) as caught:
        work.wait()
    assert_expected_inline(
        str(caught.value),
        """\
receive from rank 2 failed
  at: rank 1, attention 3, backward dKV, step 2
  because: a peer is gone: Connection closed by peer [::1]:47
  instead: look for the first error on the other ranks""",
    )


@pytest.mark.parametrize("phase", Phase)
def test_tags_are_read_back(phase: Phase) -> None:
    for attention in (0, 5, 2**15 - 1):
        for step in (0, 3, 2**13 - 1):
            tag = Tag(attention, phase, step)
            assert Tag.decode(tag.encode()) == tag
            assert tag.encode() < 2**31
