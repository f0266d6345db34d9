"""Hops by the GPUs' copy engines, through memory that peers can read.

A sender puts rows into its own buffer and signals; the receiver pulls them straight
from there into memory of its own, and signals back that their place is free. A pull
takes no SM, so compute runs on beside undisturbed, and signals live on the GPU: no host
waits, and CUDA graphs capture it all. Invariants: a hop's tag tells its places to both
ends, whatever ran before (a rank may capture a graph alone); both ends of a pair use a
place for the same hops in the same order; and what a rank enqueues waits only for what
its peers have enqueued before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from ringcompile.lowering.hops import Tag
from ringcompile.lowering.transports import driver
from ringcompile.torch_private import (
    Work,
    current_stream_handle,
    register_work,
    rendezvous,
)

_BUDGET = 4 * 2**30
_SHARE = 32
"""Bytes of a rank's buffer, whatever the number of ranks, and what part of its GPU's
memory they may be. Larger hops go in parts, and kernels wait while those wait for
places: on 4 H200s a ring whose hops had 5 parts took 82.6 ms, torch's own 70.9."""

_PLACES = 3
"""Parts of a buffer for each peer: one is filled, one read, one waits."""

_ALIGNMENT = 512
_FLAG_BYTES = 4


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


@dataclass(frozen=True, slots=True)
class _Part:
    """What of a hop goes through one place.

    Attributes:
        place: number of the place.
        slices: what it holds.
        address: where it lies in the owner's buffer.
    """

    place: int
    slices: tuple[_Slice, ...]
    address: int


class CopyEngine:
    """The hops of one process group."""

    def __init__(self, group: dist.ProcessGroup, memory: Tensor) -> None:
        """Every rank must come here: buffers are exchanged.

        Args:
            group: the ranks.
            memory: ``buffer_bytes`` bytes of what GPUs can share.
        """
        self._rank, self._size, self._own = group.rank(), group.size(), memory
        self._device = memory.device.index
        self._place_bytes = memory.numel() // ((self._size - 1) * _PLACES)
        shared = self._shared = rendezvous(memory, group)
        self._buffers = [
            shared.get_buffer(rank, memory.shape, torch.uint8).data_ptr()
            for rank in range(self._size)
        ]
        self._cut = lru_cache(maxsize=4096)(self._cut_parts)
        self._pulling: int = torch.cuda.Stream(self._device).cuda_stream
        self._ready, self._published = driver.Event(), driver.Event()
        self._idle_events: list[driver.Event] = []
        here = current_stream_handle(self._device)
        self._published.record(here)
        for peer in range(self._size):
            for place in range(_PLACES if peer != self._rank else 0):
                self._set(peer, _is_free(place), here)

    @staticmethod
    def buffer_bytes(size: int, gpu_bytes: int) -> int:
        """Bytes of a rank's buffer in a group of that size, on GPUs of so much memory.

        They are a multiple of the places and of what aligns those.
        """
        places = (size - 1) * _PLACES
        room = min(_BUDGET, gpu_bytes // _SHARE)
        return room // (places * _ALIGNMENT) * places * _ALIGNMENT

    def start(
        self,
        sent: Sequence[Tensor],
        rows: Sequence[int],
        tag: Tag,
        *,
        dst: int,
        src: int,
    ) -> list[Tensor]:
        """Start a hop of contiguous tensors ``(..., n, D)``; a rank of -1 means nobody.

        Args:
            sent: what goes to ``dst``.
            rows: how many of each come from ``src``.
            tag: of the hop.
            dst: who receives.
            src: who sends.

        Returns:
            What comes, one tensor for each of ``sent``, once its ``wait`` is over. Each
            has memory of its own, as torch asks of an op's results.
        """
        here = current_stream_handle(self._device)
        is_captured = torch.cuda.is_current_stream_capturing()
        if not is_captured:
            # Hops leave in the order in which the host starts them, on any streams.
            self._published.block(here)
        received = [
            x.new_empty((*x.shape[:-2], n, x.shape[-1]))
            for x, n in zip(sent, rows, strict=True)
        ]
        first = self._first_place(tag)
        leaving = self._cut(tuple(x.nbytes for x in sent), first, self._rank, dst)
        coming = self._cut(tuple(x.nbytes for x in received), first, src, self._rank)
        sources, targets = ([x.data_ptr() for x in xs] for xs in (sent, received))
        # Part by part: each waits only for parts that all ranks have enqueued before,
        # though the streams may not run side by side. A copy within this GPU goes on
        # this stream: beside a large kernel it would wait for that one's end.
        for leaves, comes in zip_longest(leaving, coming):
            if leaves is not None:
                self._publish(leaves, sources, dst, here)
            if comes is not None:
                self._ready.record(here)
                self._ready.block(self._pulling)
                self._pull(comes, targets, src)
        if not is_captured:
            self._published.record(here)
        if coming:
            flying = _Flying(self._device, self._idle_events)
            flying.note_arrival(self._pulling)
            for x in received:
                register_work(x, flying)
        return received

    def _first_place(self, tag: Tag) -> int:
        """Where a hop starts: those to one peer that are under way together, apart.

        Of a part with a step for each rank they are forward KV, backward KV, dKV, and
        those two again for the next part. Others may meet in a place, and wait.
        """
        return tag.phase + 2 * (tag.step // self._size)

    def _publish(
        self, part: _Part, sources: Sequence[int], dst: int, stream: int
    ) -> None:
        self._take(dst, _is_free(part.place), stream)
        for s in part.slices:
            size = s.stop - s.start
            source = sources[s.tensor] + s.start
            driver.copy(part.address + s.offset, source, size, stream)
        self._set(dst, _is_full(part.place), stream)

    def _pull(self, part: _Part, targets: Sequence[int], src: int) -> None:
        self._take(src, _is_full(part.place), self._pulling)
        for s in part.slices:
            size = s.stop - s.start
            target = targets[s.tensor] + s.start
            driver.copy(target, part.address + s.offset, size, self._pulling)
        self._set(src, _is_free(part.place), self._pulling)

    def _cut_parts(
        self, sizes: Sequence[int], first: int, owner: int, reader: int
    ) -> tuple[_Part, ...]:
        """The parts of a hop, through the owner's places for a reader."""
        if min(owner, reader) < 0:
            return ()
        cut = cut_into_places(sizes, self._place_bytes)
        places_of_reader = (reader - (reader > owner)) * _PLACES
        return tuple(
            _Part(
                number % _PLACES,
                tuple(slices),
                self._buffers[owner]
                + (places_of_reader + number % _PLACES) * self._place_bytes,
            )
            for number, slices in enumerate(cut, first)
        )

    # A rank has a flag of each number for each peer, all of them down at first. Each is
    # set only when it is down; who waits for it takes it down again.

    def _set(self, peer: int, number: int, stream: int) -> None:
        """Set the flag that a peer waits for, after the stream's work."""
        driver.set_flag(self._flag(peer, number, self._rank), 1, stream)

    def _take(self, peer: int, number: int, stream: int) -> None:
        """Let the stream wait until a peer has set the flag."""
        address = self._flag(self._rank, number, peer)
        driver.await_flag(address, 1, stream)
        driver.set_flag(address, 0, stream)

    def _flag(self, owner: int, number: int, setter: int) -> int:
        pads = self._shared.signal_pad_ptrs
        return pads[owner] + _FLAG_BYTES * (number * self._size + setter)


class _Flying(Work):
    """A hop under way; ``wait`` makes the current stream wait for what it brings."""

    def __init__(self, device: int, idle_events: list[driver.Event]) -> None:
        super().__init__()
        self._device, self._idle_events = device, idle_events
        self._arrived: driver.Event | None = None

    def note_arrival(self, stream: int) -> None:
        """All that comes is there once the stream has got to here."""
        self._arrived = self._idle_events.pop() if self._idle_events else driver.Event()
        self._arrived.record(stream)

    def wait(self, _timeout: object = None) -> bool:
        """Order the current stream behind the copies; no host waits."""
        arrived, self._arrived = self._arrived, None
        if arrived is not None:
            arrived.block(current_stream_handle(self._device))
            self._idle_events.append(arrived)  # what waits for it does so already
        return True


def _is_full(place: int) -> int:
    return 2 * place


def _is_free(place: int) -> int:
    return 2 * place + 1
