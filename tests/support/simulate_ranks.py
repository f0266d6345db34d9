"""Run all ranks of a rewritten graph in one process: no process group, no sockets.

Each rank is a thread, and one runs at a time, until it waits for what a peer has not
sent yet. So a run is deterministic, and ranks that wait for each other are seen at once.
A result of communication holds NaN until ``wait_tensor`` ends it.

    def work(rank: int) -> Tensor:
        return graphs[rank](*inputs[rank])

    outputs = simulate(size, work)
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from ringcompile.lowering.hops import Tag
from ringcompile.torch_private import Work, register_work

T = TypeVar("T")

GROUP_NAME = "simulated"
MAX_RANKS = 16


class SimulationError(Exception):
    """Ranks that do not fit together: other sequences of ops, or a wait for ever."""


class _StoppedError(Exception):
    """Ends a rank because another has failed."""


@dataclass(frozen=True, slots=True)
class Call:
    """One communication op as a rank calls it.

    Attributes:
        op: ``hop``, ``all_gather`` or ``all_reduce``.
        tag: its tag.
        sent: copies of what it sends.
        dst: of a hop, -1 for none.
        src: of a hop, -1 for none.
        wants: shapes of what it expects.
    """

    op: str
    tag: int
    sent: tuple[Tensor, ...]
    dst: int = -1
    src: int = -1
    wants: tuple[torch.Size, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} of {Tag.decode(self.tag)}"


def simulate(size: int, work: Callable[[int], T]) -> list[T]:
    """Call ``work(rank)`` for every rank, their communication exchanged in here.

    Args:
        size: number of ranks.
        work: runs a rank's graphs, whose ``group_name`` is ``GROUP_NAME``.

    Returns:
        The results, by rank.

    Raises:
        SimulationError: ranks call other ops, or wait for each other.
        Exception: what the first rank to fail has raised.
    """
    world = _World(size)
    results: dict[int, T] = {}

    def run(rank: int) -> None:
        _here.world, _here.rank = world, rank

        def note() -> None:
            results[rank] = work(rank)

        world.live(rank, note)

    threads = [
        threading.Thread(target=run, args=(r,), daemon=True) for r in range(size)
    ]
    with _simulated_ops():
        for thread in threads:
            thread.start()
        world.gates[0].release()
        for thread in threads:
            thread.join()
    if world.errors:
        raise world.errors[0]
    _check_calls(world.calls)
    return [results[rank] for rank in range(size)]


# ---- turns ---------------------------------------------------------------------------


class _World:
    """The ranks of one simulation: whose turn it is, and what each has sent.

    Attributes:
        calls: the communication ops of each rank, in order.
        gates: a rank runs after its gate was released.
        errors: what ranks have raised, the first one first.
    """

    def __init__(self, size: int) -> None:
        self.calls: list[list[Call]] = [[] for _ in range(size)]
        self.gates = [threading.Semaphore(0) for _ in range(size)]
        self.errors: list[Exception] = []
        self._live = list(range(size))
        self._progress = 0

    def live(self, rank: int, work: Callable[[], None]) -> None:
        """A rank's life: from its first turn to the hand-over at its end."""
        self.gates[rank].acquire()
        try:
            if not self.errors:
                work()
        except _StoppedError:
            pass
        except Exception as error:
            self.errors.append(error)
        finally:
            following = self._following(rank)
            self._live.remove(rank)
            self._progress += 1
            if following != rank:
                self.gates[following].release()

    def post(self, rank: int, call: Call) -> int:
        """Send; returns the number of the call, by which peers find it."""
        self.calls[rank].append(call)
        self._progress += 1
        return len(self.calls[rank]) - 1

    def fetch(self, rank: int, peer: int, number: int) -> Call:
        """The call of that number of a peer, once it is there."""
        mine = self.calls[rank][number]
        while len(self.calls[peer]) <= number:
            before = self._progress
            self._hand_over(rank)
            if peer not in self._live and len(self.calls[peer]) <= number:
                raise SimulationError(
                    f"rank {rank} waits for rank {peer} at its call {number}, {mine};"
                    f" that rank has ended after {len(self.calls[peer])} calls"
                )
            if self._progress == before:
                raise SimulationError(f"rank {rank} waits for rank {peer} for ever")
        theirs = self.calls[peer][number]
        if (theirs.op, theirs.tag) != (mine.op, mine.tag):
            raise SimulationError(
                f"call {number} is {mine} on rank {rank} and {theirs} on rank {peer}"
            )
        return theirs

    def _hand_over(self, rank: int) -> None:
        """Let every other rank have a turn."""
        following = self._following(rank)
        if following != rank:
            self.gates[following].release()
            self.gates[rank].acquire()
        if self.errors:
            raise _StoppedError

    def _following(self, rank: int) -> int:
        later = [r for r in self._live if r > rank]
        return (later or self._live)[0]


class _Here(threading.local):
    """The simulation and the rank that the thread at hand is."""

    world: _World
    rank: int


_here = _Here()


def _check_calls(calls: Sequence[Sequence[Call]]) -> None:
    """Every rank made the same calls, and both ends of each hop know of each other."""
    for rank, own in enumerate(calls):
        if [(c.op, c.tag) for c in own] != [(c.op, c.tag) for c in calls[0]]:
            raise SimulationError(
                f"rank {rank} called {[*map(str, own)]},"
                f" rank 0 called {[*map(str, calls[0])]}"
            )
        for number, call in enumerate(own):
            if call.dst >= 0 and calls[call.dst][number].src != rank:
                raise SimulationError(f"{call} of rank {rank} goes to no reader")


# ---- the ops -------------------------------------------------------------------------


class _Arrival(Work):
    """Communication under way; ``finish`` ends it."""

    def __init__(self, finish: Callable[[], None]) -> None:
        super().__init__()
        self._finish: Callable[[], None] | None = finish

    def wait(self, _timeout: timedelta | None = None) -> bool:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        return True


def _hop(
    payload: Sequence[Tensor],
    _deps: Sequence[Tensor],
    dst: int,
    src: int,
    recv_rows: Sequence[int],
    tag: int,
    _group_name: str,
    _timeout_s: float,
    _transport: str = "p2p",  # what is the default is not passed
) -> list[Tensor]:
    received = [
        _unknown(x, (*x.shape[:-2], rows, x.shape[-1]))
        for x, rows in zip(payload, recv_rows, strict=True)
    ]
    wants = tuple(x.shape for x in received)
    number = _post(Call("hop", tag, _copies(payload), dst, src, wants))
    if src < 0:
        return received
    world, rank = _here.world, _here.rank

    def finish() -> None:
        theirs = world.fetch(rank, src, number)
        if theirs.dst != rank:
            raise SimulationError(f"{theirs} of rank {src} does not go to rank {rank}")
        _copy_in(received, theirs.sent)

    return _under_way(received, finish)


def _all_gather(
    x: Tensor, cp_size: int, tag: int, _group_name: str, _timeout_s: float
) -> Tensor:
    gathered = _unknown(x, (cp_size, *x.shape))
    number = _post(Call("all_gather", tag, _copies([x])))
    world, rank = _here.world, _here.rank

    def finish() -> None:
        for peer in range(cp_size):
            _copy_in([gathered[peer]], world.fetch(rank, peer, number).sent)

    return _under_way([gathered], finish)[0]


def _all_reduce(
    xs: Sequence[Tensor], tag: int, _group_name: str, _timeout_s: float
) -> list[Tensor]:
    sums = [_unknown(x, x.shape) for x in xs]
    number = _post(Call("all_reduce", tag, _copies(xs)))
    world, rank = _here.world, _here.rank
    parts = [world.fetch(rank, p, number).sent for p in range(len(world.calls))]
    _copy_in(sums, [sum(xs[1:], xs[0]) for xs in zip(*parts, strict=True)])
    return sums


def _post(call: Call) -> int:
    return _here.world.post(_here.rank, call)


def _copies(xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone() for x in xs)


def _unknown(like: Tensor, shape: Sequence[int]) -> Tensor:
    return like.new_full(shape, torch.nan if like.is_floating_point() else -1)


def _copy_in(to: Sequence[Tensor], sent: Sequence[Tensor]) -> None:
    here, there = ([(x.shape, x.dtype) for x in xs] for xs in (to, sent))
    if here != there:
        raise SimulationError(f"expected {here}, a peer has sent {there}")
    for x, y in zip(to, sent, strict=True):
        x.copy_(y)


def _under_way(results: list[Tensor], finish: Callable[[], None]) -> list[Tensor]:
    work = _Arrival(finish)
    for x in results:
        register_work(x, work)
    return results


@contextmanager
def _simulated_ops() -> Iterator[None]:
    """Inside, communication ops are the ones above."""
    library = torch.library.Library("ringcompile", "IMPL")
    kernels = {"hop": _hop, "all_gather": _all_gather, "all_reduce": _all_reduce}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of kernels that are put on top
            for name, kernel in kernels.items():
                library.impl(name, kernel, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
