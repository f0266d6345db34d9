"""The demo's ranks as processes: started, listened to, and ended with their parent.

Invariant: no rank outlives the call of ``run_ranks`` or the process that made it.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory

from ringcompile.demo.records import DemoSize, Failure, RankResult, Stage

LOG_CHARS = 4000


class RankFailedError(Exception):
    """A rank raised or died; the text holds its traceback and what it printed."""


@dataclass(frozen=True, slots=True)
class _Task:
    """What a rank is told once."""

    rank: int
    size: DemoSize
    store: str


@dataclass(frozen=True, slots=True)
class _Rank:
    number: int
    process: "subprocess.Popen[bytes]"
    connection: Connection

    def end(self) -> None:
        """End the process and all that it started, compilers included."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


def run_ranks(
    size: DemoSize, on_stage: Callable[[int, Stage], None]
) -> tuple[RankResult, ...]:
    """Run all ranks and wait for them.

    Args:
        size: what to run.
        on_stage: hears of each rank's stages.

    Raises:
        RankFailedError: a rank raised or died.
    """
    with TemporaryDirectory(prefix="ringcompile-demo-") as name:
        folder = Path(name)
        with _started(size, folder) as ranks:
            return _collect(ranks, on_stage, folder)


@contextmanager
def _started(size: DemoSize, folder: Path) -> Iterator[list[_Rank]]:
    ranks: list[_Rank] = []
    try:
        for number in range(size.ranks):
            ranks.append(_start(number, folder))
            ranks[-1].connection.send(_Task(number, size, str(folder / "store")))
        yield ranks
    finally:
        for rank in ranks:
            rank.end()


def _start(number: int, folder: Path) -> _Rank:
    ours, theirs = multiprocessing.Pipe()
    command = f"from {__name__} import enter; enter({theirs.fileno()})"
    with theirs, _log_file(folder, number).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the parent, which ends them all
        )
    return _Rank(number, process, ours)


def _collect(
    ranks: list[_Rank], on_stage: Callable[[int, Stage], None], folder: Path
) -> tuple[RankResult, ...]:
    waiting = {rank.connection: rank for rank in ranks}
    results: dict[int, RankResult] = {}
    while waiting:
        for connection in wait(list(waiting)):
            assert isinstance(connection, Connection), "only pipes are waited for"
            rank = waiting[connection]
            try:
                message = connection.recv()
            except EOFError:
                message = Failure(f"it died with status {rank.process.wait()}")
            if isinstance(message, Stage):
                on_stage(rank.number, message)
            elif isinstance(message, Failure):
                raise RankFailedError(_format_failure(rank.number, message, folder))
            else:
                results[rank.number] = message
                del waiting[connection]
    return tuple(results[rank.number] for rank in ranks)


def _format_failure(rank: int, failure: Failure, folder: Path) -> str:
    log = _log_file(folder, rank).read_text(errors="replace")[-LOG_CHARS:].strip()
    printed = f"\nrank {rank} printed:\n{log}" if log else ""
    return f"rank {rank} failed: {failure.text.strip()}{printed}"


def _log_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


# ---- in the rank ---------------------------------------------------------------------


def enter(pipe: int) -> None:
    """Be a rank: do the task that comes through the pipe, and answer through it."""
    connection = Connection(pipe)
    task = connection.recv()
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    try:
        connection.send(Stage.IMPORT)
        from ringcompile.demo.rank import run_rank  # noqa: PLC0415 - takes seconds

        connection.send(run_rank(task.rank, task.size, task.store, connection.send))
    except BaseException:  # the parent must hear of any end
        connection.send(Failure(traceback.format_exc()))
    threading.Event().wait()  # for the parent, who ends all ranks together


def _end_with_parent(connection: Connection) -> None:
    """Nothing more is sent to a rank: what ends the wait is the end of the parent."""
    with suppress(EOFError, OSError):
        connection.recv()
    os.killpg(0, signal.SIGKILL)
