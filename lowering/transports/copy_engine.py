"""Hops by the GPUs' copy engines, through memory that peers can read.

A sender puts rows into its own buffer and signals; the receiver pulls them straight
from there into memory of its own, and signals back that their place is free. A pull
takes no SM, so compute runs on beside undisturbed, and signals live on the GPU: no host
waits, and CUDA graphs capture it all. Invariants: a hop's tag tells its places to both
ends, whatever ran before (a rank may capture a graph alone); both ends of a pair use a
place for the same hops in the same order; and what a rank enqueues waits only for what
its peers have enqueued before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from ringcompile.lowering.hops import Tag
from ringcompile.lowering.transports.flags import Flags
from ringcompile.torch_private import Work, rendezvous

_BUDGET = 4 * 2**30
_SHARE = 32
"""Bytes of a rank's buffer, whatever the number of ranks, and what part of its GPU's
memory they may be. Larger hops go in parts, and kernels wait while those wait for
places: on 4 H200s a ring whose hops had 5 parts took 82.6 ms, torch's own 70.9."""

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


@dataclass(frozen=True, slots=True)
class _Part:
    """What of a hop goes through one place.

    Attributes:
        place: number of the place.
        pairs: bytes of tensors, each with those of the owner's buffer.
    """

    place: int
    pairs: tuple[tuple[Tensor, Tensor], ...]


class CopyEngine:
    """The hops of one process group."""

    def __init__(self, group: dist.ProcessGroup, memory: Tensor) -> None:
        """Every rank must come here: buffers are exchanged.

        Args:
            group: the ranks.
            memory: ``buffer_bytes`` bytes of what GPUs can share.
        """
        self._rank, self._size, self._own = group.rank(), group.size(), memory
        self._place_bytes = memory.numel() // ((self._size - 1) * _PLACES)
        shared = rendezvous(memory, group)
        self._flags = Flags(shared)
        self._buffers = [
            shared.get_buffer(rank, memory.shape, torch.uint8)
            for rank in range(self._size)
        ]
        self._pulling = torch.cuda.Stream()
        self._published: torch.cuda.Event | None = None
        for peer in range(self._size):
            for place in range(_PLACES if peer != self._rank else 0):
                self._flags.set(peer, _is_free(place))

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
        received: Sequence[Tensor],
        tag: Tag,
        *,
        dst: int,
        src: int,
    ) -> "_Flying":
        """Start a hop of contiguous tensors; a rank of -1 means nobody."""
        here = torch.cuda.current_stream()
        self._order_behind_last(here)
        first = self._first_place(tag)
        leaving = self._cut(sent, first, self._rank, reader=dst)
        coming = self._cut(received, first, src, reader=self._rank)
        arrived = None
        # Part by part: each waits only for parts that all ranks have enqueued before,
        # though the streams may not run side by side. A copy within this GPU goes on
        # this stream: beside a large kernel it would wait for that one's end.
        for leaves, comes in zip_longest(leaving, coming):
            if leaves is not None:
                self._publish(leaves, dst)
            if comes is not None:
                self._pulling.wait_event(here.record_event())
                with torch.cuda.stream(self._pulling):
                    self._pull(comes, src)
                    arrived = self._pulling.record_event()
        if not torch.cuda.is_current_stream_capturing():
            self._published = here.record_event()
        return _Flying(arrived)

    def _first_place(self, tag: Tag) -> int:
        """Where a hop starts: those to one peer that are under way together, apart.

        Of a part with a step for each rank they are forward KV, backward KV, dKV, and
        those two again for the next part. Others may meet in a place, and wait.
        """
        return tag.phase + 2 * (tag.step // self._size)

    def _order_behind_last(self, here: torch.cuda.Stream) -> None:
        """Hops leave in the order in which the host starts them, on any streams."""
        if self._published and not torch.cuda.is_current_stream_capturing():
            here.wait_event(self._published)

    def _publish(self, part: _Part, dst: int) -> None:
        self._flags.take(dst, _is_free(part.place))
        for x, at in part.pairs:
            at.copy_(x)
        self._flags.set(dst, _is_full(part.place))

    def _pull(self, part: _Part, src: int) -> None:
        self._flags.take(src, _is_full(part.place))
        for x, at in part.pairs:
            x.copy_(at)
        self._flags.set(src, _is_free(part.place))

    def _cut(
        self, tensors: Sequence[Tensor], first: int, owner: int, *, reader: int
    ) -> Iterator[_Part]:
        """The parts of a hop, through the owner's places for a reader."""
        if min(owner, reader) < 0:
            return
        xs, size = list(map(_bytes, tensors)), self._place_bytes
        cut = cut_into_places([x.numel() for x in xs], size)
        places_of_reader = (reader - (reader > owner)) * _PLACES
        for number, slices in enumerate(cut, first):
            place = number % _PLACES
            start = (places_of_reader + place) * size
            yield _Part(
                place,
                tuple(
                    (
                        xs[s.tensor][s.start : s.stop],
                        self._buffers[owner][start + s.offset :][: s.stop - s.start],
                    )
                    for s in slices
                ),
            )


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
