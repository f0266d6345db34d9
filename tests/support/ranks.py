"""One pool of gloo ranks per test run: starting 4 processes costs about 24 s on 2 cores.

A test sends it a module-level function and gets back what it returned on each rank:

    def sum_of_ranks(group: ProcessGroup, rank: int, start: float) -> float:
        x = torch.tensor(start + rank)
        dist.all_reduce(x, group=group)
        return x.item()

    def test_sum(ranks: RankPool) -> None:
        assert ranks.run(sum_of_ranks, 1.0, world_size=3) == [6.0, 6.0, 6.0]

``group`` holds the first ``world_size`` ranks (pass it as the option ``mesh``); the
default group always holds all. An exception on a rank fails the test with that rank's
traceback, and the groups are made anew; a hang is killed with every rank's stacks, and
the next job starts a new pool. Inductor's cache is shared by all jobs of the run.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypeVar

from support.rank_worker import Job, Regroup, Reply

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 300.0
GRACE_S = 20.0  # for the peers of a rank that has failed
LOG_CHARS = 4000


class RankError(Exception):
    """A function failed on some rank; the text holds the tracebacks."""


class RankHangError(RankError):
    """Some rank did not answer in time; the text holds every rank's stacks."""


@dataclass(slots=True)
class _Worker:
    rank: int
    process: "subprocess.Popen[bytes]"
    connection: Connection
    folder: Path
    log_seen: int = 0  # bytes of the log that belong to earlier jobs

    @property
    def log_file(self) -> Path:
        return self.folder / f"log.{self.rank}"

    @property
    def stack_file(self) -> Path:
        return self.folder / f"stacks.{self.rank}"

    def read_log(self) -> str:
        """What this job has printed on this rank, or the end of it."""
        text = self.log_file.read_bytes()[self.log_seen :].decode(errors="replace")
        return text[-LOG_CHARS:].strip()


class RankPool:
    """A few gloo processes that run functions; started by the first ``run``."""

    def __init__(self, num_ranks: int = 4) -> None:
        self.num_ranks = num_ranks
        self._folder: Path | None = None
        self._workers: list[_Worker] = []
        self._num_starts = 0
        self._must_regroup = False

    @property
    def is_running(self) -> bool:
        return bool(self._workers)

    def run(
        self,
        fn: Callable[..., T],
        *args: object,
        world_size: int = 2,
        timeout_s: float = JOB_TIMEOUT_S,
    ) -> list[T]:
        """Call ``fn(group, rank, *args)`` on ranks ``0 .. world_size - 1``.

        Args:
            fn: A function at the top level of its module; its result and ``args`` must
                be picklable (tensors are copied, without their graph).
            args: The same for all ranks.
            world_size: 1 to ``num_ranks``.
            timeout_s: Seconds for all ranks to answer, after the pool has started.

        Returns:
            The results, by rank.

        Raises:
            RankError: a rank raised or died.
            RankHangError: a rank did not answer in time.
        """
        assert 1 <= world_size <= self.num_ranks, f"{world_size} of {self.num_ranks}"
        if "<" in fn.__qualname__:
            raise ValueError(f"{fn.__qualname__}: ranks need a module-level function")
        job = Job(world_size, fn.__module__, pickle.dumps((fn, args)))
        self._make_ready()
        replies = self._ask(self._workers[:world_size], job, timeout_s)
        return [pickle.loads(reply.data) for reply in replies]

    def close(self) -> None:
        """Stop the processes; a later ``run`` would start new ones."""
        for worker in self._workers:
            worker.connection.close()
        deadline = time.monotonic() + 10
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._workers = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _make_ready(self) -> None:
        if _has_died(self._workers):
            self._kill()
        if not self._workers:
            self._start()
        elif self._must_regroup:
            self._must_regroup = False
            self._ask(self._workers, Regroup(), START_TIMEOUT_S)

    def _start(self) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="ringcompile-ranks-"))
        folder = self._folder / f"start.{self._num_starts}"
        folder.mkdir()
        self._num_starts += 1
        self._must_regroup = False
        env = _worker_env(self._folder / "inductor")
        self._workers = [
            _start_worker(rank, self.num_ranks, folder, env)
            for rank in range(self.num_ranks)
        ]
        self._collect(self._workers, START_TIMEOUT_S)

    def _ask(
        self, workers: Sequence[_Worker], job: Job | Regroup, timeout_s: float
    ) -> list[Reply]:
        for worker in workers:
            worker.log_seen = worker.log_file.stat().st_size
            worker.connection.send(job)
        return self._collect(workers, timeout_s)

    def _collect(self, workers: Sequence[_Worker], timeout_s: float) -> list[Reply]:
        replies = _receive(workers, timeout_s)
        errors = {r: reply for r, reply in replies.items() if reply.status == "error"}
        silent = [w for w in workers if w.rank not in replies]
        if not errors and not silent:
            return [replies[w.rank] for w in workers]
        text = [_format_errors(errors, len(workers))] if errors else []
        kind = RankError
        if silent:
            kind = RankError if errors or _has_died(silent) else RankHangError
            text += [_format_silence(silent, timeout_s), *_dump_stacks(self._workers)]
            self._kill()
        text += [
            f"rank {w.rank} printed:\n{log}" for w in workers if (log := w.read_log())
        ]
        self._must_regroup = True
        raise kind("\n\n".join(["", *text]))

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
        self._workers = []


def _worker_env(cache: Path) -> dict[str, str]:
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def _start_worker(
    rank: int, num_ranks: int, folder: Path, env: dict[str, str]
) -> _Worker:
    ours, theirs = Pipe()
    main = "from support.rank_worker import main; main()"
    arguments = [str(theirs.fileno()), str(rank), str(num_ranks), str(folder)]
    with theirs, (folder / f"log.{rank}").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", main, *arguments],
            cwd=ROOT,
            env=env,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the test run, which ends the pool
        )
    return _Worker(rank, process, ours, folder)


def _receive(workers: Sequence[_Worker], timeout_s: float) -> dict[int, Reply]:
    """Replies by rank, until all are there, or one rank has died, or time is up."""
    replies: dict[int, Reply] = {}
    waiting = {w.connection: w for w in workers}
    deadline = time.monotonic() + timeout_s
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(waiting), left):
            assert isinstance(connection, Connection)
            worker = waiting.pop(connection)
            try:
                replies[worker.rank] = connection.recv()
                failed = replies[worker.rank].status == "error"
            except (EOFError, ConnectionResetError):
                failed = True
                with suppress(subprocess.TimeoutExpired):  # it has only just died
                    worker.process.wait(5)
            if failed:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return replies


def _format_errors(errors: dict[int, Reply], world_size: int) -> str:
    by_text: dict[str, list[int]] = {}
    for rank, reply in sorted(errors.items()):
        by_text.setdefault(reply.text.strip(), []).append(rank)
    return "\n\n".join(
        f"rank {', '.join(map(str, at))} of {world_size} raised:\n{text}"
        for text, at in by_text.items()
    )


def _has_died(workers: Sequence[_Worker]) -> bool:
    return any(w.process.poll() is not None for w in workers)


def _format_silence(silent: Sequence[_Worker], timeout_s: float) -> str:
    return "\n".join(
        f"rank {w.rank} did not answer within {timeout_s:g} s, "
        f"or {GRACE_S:g} s after a failure"
        if (code := w.process.poll()) is None
        else f"rank {w.rank} died with exit status {code}"
        for w in silent
    )


def _dump_stacks(workers: Sequence[_Worker]) -> list[str]:
    """Every live rank's Python stacks; for one that crashed, what it left."""
    alive = [w for w in workers if w.process.poll() is None]
    for worker in alive:
        worker.process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not all(
        w.stack_file.stat().st_size for w in alive
    ):
        time.sleep(0.1)
    time.sleep(0.2)  # for the rest of the last one
    return [
        f"stacks of rank {w.rank}:\n{text}"
        for w in workers
        if w.stack_file.exists() and (text := w.stack_file.read_text().strip())
    ]
