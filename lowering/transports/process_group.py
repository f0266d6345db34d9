"""Hops and collectives over a ``torch.distributed`` process group.

A hop or a gather registers a work with its results, and ``wait_tensor`` ends it; a sum
waits by itself. Invariant: no wait outlasts ``timeout_s`` on gloo, and one that fails
names rank, peer and step. On NCCL, and by copies, a wait only orders streams; there the
group's own watchdog ends a hang.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from ringcompile import ops
from ringcompile.errors import TransportError
from ringcompile.lowering.hops import Tag
from ringcompile.lowering.transports.choose import find_engine
from ringcompile.torch_private import (
    Work,
    find_group,
    register_work,
    start_all_gather,
)


@dataclass(frozen=True, slots=True)
class _Transfer:
    """One pending transfer of torch's, and its name: ``send to rank 2``."""

    work: dist.Work
    name: str


@dataclass(frozen=True, slots=True)
class _Place:
    """Who waits for what, and for how long.

    Attributes:
        rank: the rank that waits.
        tag: of the op.
        timeout_s: the longest wait.
        on_host: whether to wait at all; else only the stream is made to.
    """

    rank: int
    tag: int
    timeout_s: float
    on_host: bool = True

    def wait(self, work: dist.Work) -> None:
        """End one transfer."""
        if self.on_host:
            work.wait(timedelta(seconds=self.timeout_s))
        else:
            work.wait()  # given a limit, NCCL's blocks the host, asleep 10 ms at a time


class TimedWork(Work):
    """Pending transfers; ``wait`` ends them all or raises ``TransportError``.

    Holds the tensors that are being sent, so that they outlive the transfer.
    """

    def __init__(
        self,
        place: _Place,
        transfers: Sequence[_Transfer],
        held: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self._place = place
        self._transfers = tuple(transfers)
        self._held = tuple(held)

    def wait(self, _timeout: timedelta | None = None) -> bool:
        """Wait for all transfers, each for at most ``timeout_s``."""
        transfers, self._transfers = self._transfers, ()
        for transfer in transfers:
            try:
                self._place.wait(transfer.work)
            except RuntimeError as error:
                raise _transport_error(self._place, transfer.name, error) from error
        self._held = ()
        return True


def _transport_error(place: _Place, name: str, error: Exception) -> TransportError:
    reason = (str(error).splitlines() or [""])[0].rpartition("] ")[2]  # no file, line
    is_late = "timed out" in reason.lower()
    return TransportError(
        f"{name} did not finish within timeout_s={place.timeout_s:g}"
        if is_late
        else f"{name} failed",
        at=f"rank {place.rank}, {Tag.decode(place.tag)}",
        because="a peer is stopped or slow" if is_late else f"a peer is gone: {reason}",
        instead="look for the first error on the other ranks"
        + ("; a larger timeout_s if one is only slow" if is_late else ""),
    )


# ---- hop -----------------------------------------------------------------------------


def _hop(  # noqa: PLR0913, PLR0917 - the op's schema
    payload: Sequence[Tensor],
    _deps: Sequence[Tensor],
    dst: int,
    src: int,
    recv_rows: Sequence[int],
    tag: int,
    group_name: str,
    timeout_s: float,
    transport: str = "p2p",
) -> list[Tensor]:
    group = find_group(group_name)
    engine = find_engine(transport, group) if payload[0].is_cuda else None
    sent = [x.contiguous() for x in payload]
    if engine is not None:
        return engine.start(sent, recv_rows, Tag.decode(tag), dst=dst, src=src)
    received = [
        x.new_empty((*x.shape[:-2], rows, x.shape[-1]))
        for x, rows in zip(payload, recv_rows, strict=True)
    ]
    _warm_up(group, payload[0])
    # Rows travel only where there are some; both ends know how many there are.
    sends = [x for x in sent if dst >= 0 and x.numel()]
    receives = [x for x in received if src >= 0 and x.numel()]
    requests = [dist.P2POp(dist.isend, x, None, group, tag, dst) for x in sends]
    requests += [dist.P2POp(dist.irecv, x, None, group, tag, src) for x in receives]
    if not requests:
        return received
    on_host = not payload[0].is_cuda
    place = _Place(dist.get_rank(group), tag, timeout_s, on_host)
    names = [f"send to rank {dst}"] * len(sends)
    names += [f"receive from rank {src}"] * len(receives)
    try:
        works = dist.batch_isend_irecv(requests)
    except RuntimeError as error:  # gloo knows already that a peer is gone
        raise _transport_error(
            place, " and ".join(dict.fromkeys(names)), error
        ) from error
    if len(works) < len(names):  # NCCL: one work for all
        names = [" and ".join(dict.fromkeys(names))] * len(works)
    transfers = [_Transfer(w, n) for w, n in zip(works, names, strict=True)]
    work = TimedWork(place, transfers, sends)
    for x in received:
        register_work(x, work)
    return received


_warm_groups: WeakSet[dist.ProcessGroup] = WeakSet()


def _warm_up(group: dist.ProcessGroup, like: Tensor) -> None:
    """Let all ranks meet before their first hop over NCCL.

    The first batched P2P of an NCCL group must involve every rank (pytorch PR #74701).
    All ranks emit the same hops, so each of them comes here at its first one.
    """
    if like.is_cuda and group not in _warm_groups:
        _warm_groups.add(group)
        dist.all_reduce(like.new_zeros(1), group=group)


# ---- collectives ---------------------------------------------------------------------


def _all_gather(
    x: Tensor, cp_size: int, tag: int, group_name: str, timeout_s: float
) -> Tensor:
    group = find_group(group_name)
    assert group.size() == cp_size, f"{group.size()} ranks, planned for {cp_size}"
    sent = x.contiguous()
    gathered = x.new_empty((cp_size, *x.shape))
    work = start_all_gather(group, gathered, sent, timeout_s)
    place = _Place(dist.get_rank(group), tag, timeout_s, on_host=not x.is_cuda)
    transfer = _Transfer(work, "all-gather")
    register_work(gathered, TimedWork(place, [transfer], [sent]))
    return gathered


def _all_reduce(
    xs: Sequence[Tensor], tag: int, group_name: str, timeout_s: float
) -> list[Tensor]:
    """Sum each tensor over the ranks, through one flat buffer per dtype.

    Nothing overlaps it: a sum is asked for where it is needed, those of a bucket of
    gradients when the last of them is there.
    """
    group = find_group(group_name)
    options = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=timeout_s)
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    on_host = not xs[0].is_cuda
    place = _Place(dist.get_rank(group), tag, timeout_s, on_host)
    for dtype in dict.fromkeys(x.dtype for x in xs):
        mine = [i for i, x in enumerate(xs) if x.dtype == dtype]
        flat = torch.cat([xs[i].reshape(-1) for i in mine])
        transfer = _Transfer(group.allreduce([flat], options), "all-reduce")
        TimedWork(place, [transfer], [flat]).wait()
        parts = flat.split([xs[i].numel() for i in mine])
        for i, part in zip(mine, parts, strict=True):
            results[i].copy_(part.view(xs[i].shape))
    return results


for _key in ("CPU", "CUDA"):
    ops.LIBRARY.impl("hop", _hop, _key)
    ops.LIBRARY.impl("all_gather", _all_gather, _key)
    ops.LIBRARY.impl("all_reduce", _all_reduce, _key)
