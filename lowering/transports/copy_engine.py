"""Hops by the GPUs' copy engines, through memory that peers can read.

A sender puts rows into its own buffer and signals; the receiver pulls them straight
from there into memory of its own, and signals back that their place is free. Nothing
but the signals takes an SM, so compute runs on beside undisturbed, and signals live on
the GPU: no host waits, and CUDA graphs capture it all. Invariant: a hop's tag tells its
places to both ends, whatever ran before (a rank may capture a graph alone), and both
ends of a pair use a place for the same hops in the same order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ringcompile.lowering.hops import Tag
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
        for peer in range(size):
            for place in range(_PLACES if peer != self._rank else 0):
                self._memory.put_signal(peer, _is_free(place))

    def start(
        self,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        where: "_Where",
    ) -> "_Flying":
        """Start a hop of contiguous tensors."""
        ready = torch.cuda.current_stream().record_event()
        if where.dst >= 0 and any(x.numel() for x in sent):
            # On this stream: beside a large kernel the copy would wait for its end.
            self._publish(list(map(_bytes, sent)), where)
        if where.src < 0 or not any(x.numel() for x in received):
            return _Flying(None)
        with torch.cuda.stream(self._pulling):
            self._pulling.wait_event(ready)
            self._pull(list(map(_bytes, received)), where)
            return _Flying(self._pulling.record_event())

    def _publish(self, xs: Sequence[Tensor], where: "_Where") -> None:
        dst, limit = where.dst, where.timeout_ms
        for place, at, slices in self._places(xs, where, self._rank, reader=dst):
            self._memory.wait_signal(dst, _is_free(place), limit)
            for s in slices:
                at[s.offset : s.offset + s.stop - s.start].copy_(
                    xs[s.tensor][s.start : s.stop]
                )
            self._memory.put_signal(dst, _is_full(place), limit)

    def _pull(self, xs: Sequence[Tensor], where: "_Where") -> None:
        src, limit = where.src, where.timeout_ms
        for place, at, slices in self._places(xs, where, src, reader=self._rank):
            self._memory.wait_signal(src, _is_full(place), limit)
            for s in slices:
                xs[s.tensor][s.start : s.stop].copy_(
                    at[s.offset : s.offset + s.stop - s.start]
                )
            self._memory.put_signal(src, _is_free(place), limit)

    def _places(
        self, xs: Sequence[Tensor], where: "_Where", owner: int, *, reader: int
    ) -> Iterator[tuple[int, Tensor, list[_Slice]]]:
        """The places of a hop, and what goes into each."""
        cut = cut_into_places([x.numel() for x in xs], self._place_bytes)
        for number, slices in enumerate(cut, where.first_place):
            place = number % _PLACES
            start = (reader * _PLACES + place) * self._place_bytes
            yield place, self._buffers[owner][start : start + self._place_bytes], slices


@dataclass(frozen=True, slots=True)
class _Where:
    """A hop's ends; a rank of -1 means nobody. A signal that is late traps."""

    tag: Tag
    dst: int
    src: int
    timeout_ms: int

    @property
    def first_place(self) -> int:
        """Hops that are under way together start at different ones."""
        return 2 * self.tag.phase + self.tag.step


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


def start_hop(  # noqa: PLR0913 - the op's schema
    payload: Sequence[Tensor],
    received: Sequence[Tensor],
    *,
    dst: int,
    src: int,
    tag: int,
    group_name: str,
    timeout_s: float,
) -> None:
    """Send ``payload`` to ``dst`` and fill ``received`` from ``src``."""
    where = _Where(Tag.decode(tag), dst, src, round(1000 * timeout_s))
    engine = prepare(find_group(group_name))
    work = engine.start([x.contiguous() for x in payload], received, where)
    for x in received:
        register_work(x, work)
