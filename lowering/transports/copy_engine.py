"""Hops by the GPUs' copy engines, through memory that peers can read.

A sender puts rows into its own buffer and signals; the receiver pulls them straight
from there into memory of its own, and signals back that their place is free. Nothing
but the signals takes an SM, so compute runs on beside undisturbed, and signals live on
the GPU: no host waits, and CUDA graphs capture it all. Invariant: both ends of a pair
count the places that they used alike, as ranks start the same hops in the same order.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ringcompile.torch_private import (
    SymmetricMemory,
    Work,
    allocate_symmetric,
    find_group,
    register_work,
)

_BUDGET = 512 * 2**20
"""Bytes of a rank's buffer, whatever the number of ranks; larger hops go in parts."""

_PLACES = 3
"""Parts of a buffer for each peer: one is filled, one read, one waits."""

_ALIGNMENT = 512


@dataclass(frozen=True, slots=True)
class _Slice:
    """Bytes ``start`` to ``stop`` of a tensor, which lie at ``offset`` of a place."""

    tensor: int
    start: int
    stop: int
    offset: int


def cut_into_places(sizes: Sequence[int], capacity: int) -> list[list[_Slice]]:
    """What of tensors of that many bytes goes into one place after the other.

    Args:
        sizes: bytes of each tensor.
        capacity: bytes of a place, a multiple of the alignment.
    """
    places: list[list[_Slice]] = []
    free = 0
    for tensor, size in enumerate(sizes):
        start = 0
        while start < size:
            if not free:
                places.append([])
                free = capacity
            stop = min(size, start + free)
            places[-1].append(_Slice(tensor, start, stop, capacity - free))
            free -= min(free, -(-(stop - start) // _ALIGNMENT) * _ALIGNMENT)
            start = stop
    return places


class CopyEngine:
    """The hops of one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Every rank must come here: buffers are exchanged."""
        size, self._rank = group.size(), group.rank()
        device = torch.device("cuda", torch.cuda.current_device())
        self._place_bytes = _BUDGET // (size * _PLACES) // _ALIGNMENT * _ALIGNMENT
        num_bytes = size * _PLACES * self._place_bytes
        self._memory: SymmetricMemory = allocate_symmetric(num_bytes, group, device)
        self._buffers = [
            self._memory.get_buffer(rank, (num_bytes,), torch.uint8)
            for rank in range(size)
        ]
        # Its few blocks must not queue behind those of a large kernel.
        self._pulling = torch.cuda.Stream(priority=-1)
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()
        for peer in range(size):
            for place in range(_PLACES if peer != self._rank else 0):
                self._memory.put_signal(peer, _is_free(place))

    def start(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], *, dst: int, src: int
    ) -> "_Flying":
        """Start a hop of contiguous tensors; a rank of -1 means nobody."""
        ready = torch.cuda.current_stream().record_event()
        if dst >= 0 and any(x.numel() for x in sent):
            # On this stream: beside a large kernel the copy would wait for its end.
            self._publish(list(map(_bytes, sent)), dst)
        if src < 0 or not any(x.numel() for x in received):
            return _Flying(None)
        with torch.cuda.stream(self._pulling):
            self._pulling.wait_event(ready)
            self._pull(list(map(_bytes, received)), src)
            return _Flying(self._pulling.record_event())

    def _publish(self, xs: Sequence[Tensor], dst: int) -> None:
        for place, at, slices in self._places(xs, self._sent, dst, owner=self._rank):
            self._memory.wait_signal(dst, _is_free(place))
            for s in slices:
                at[s.offset : s.offset + s.stop - s.start].copy_(
                    xs[s.tensor][s.start : s.stop]
                )
            self._memory.put_signal(dst, _is_full(place))

    def _pull(self, xs: Sequence[Tensor], src: int) -> None:
        for place, at, slices in self._places(xs, self._received, src, owner=src):
            self._memory.wait_signal(src, _is_full(place))
            for s in slices:
                xs[s.tensor][s.start : s.stop].copy_(
                    at[s.offset : s.offset + s.stop - s.start]
                )
            self._memory.put_signal(src, _is_free(place))

    def _places(
        self, xs: Sequence[Tensor], used: Counter[int], peer: int, *, owner: int
    ) -> Iterator[tuple[int, Tensor, list[_Slice]]]:
        """The next places between this rank and a peer, in the owner's buffer."""
        reader = peer if owner == self._rank else self._rank
        for slices in cut_into_places([x.numel() for x in xs], self._place_bytes):
            place = used[peer] % _PLACES
            used[peer] += 1
            start = (reader * _PLACES + place) * self._place_bytes
            yield place, self._buffers[owner][start : start + self._place_bytes], slices


class _Flying(Work):
    """A hop under way; ``wait`` makes the current stream wait for what it brings."""

    def __init__(self, arrived: torch.cuda.Event | None) -> None:
        super().__init__()
        self._arrived = arrived

    def wait(self, _timeout: object = None) -> bool:
        """Order the current stream behind the copies; no host waits."""
        if self._arrived is not None:
            torch.cuda.current_stream().wait_event(self._arrived)
        return True


def _is_full(place: int) -> int:
    return 2 * place


def _is_free(place: int) -> int:
    return 2 * place + 1


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


_engines: WeakKeyDictionary[dist.ProcessGroup, CopyEngine] = WeakKeyDictionary()


def prepare(group: dist.ProcessGroup) -> CopyEngine:
    """The engine of a group; all its ranks must come, the first time.

    Not in a CUDA graph's warm-up, whose memory is not for what stays.
    """
    engine = _engines.get(group)
    if engine is None:
        engine = _engines[group] = CopyEngine(group)
    return engine


def start_hop(
    payload: Sequence[Tensor],
    received: Sequence[Tensor],
    *,
    dst: int,
    src: int,
    group_name: str,
) -> None:
    """Send ``payload`` to ``dst`` and fill ``received`` from ``src``."""
    engine = prepare(find_group(group_name))
    sent = [x.contiguous() for x in payload]
    work = engine.start(sent, received, dst=dst, src=src)
    for x in received:
        register_work(x, work)
