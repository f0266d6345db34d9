"""One rank of the pool: a process that runs the functions it is sent.

Started by ``support.ranks`` with a pipe, its rank, the number of ranks and a folder.
"""

import faulthandler
import importlib
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(minutes=30)  # above any job's limit: the pool tells the story


@dataclass(frozen=True, slots=True)
class Job:
    """Run ``call``, a pickled ``(function, args)``, in the first ``world_size`` ranks."""

    world_size: int
    module: str
    call: bytes


@dataclass(frozen=True, slots=True)
class Regroup:
    """Make all groups anew: a failed job may have left messages in the old ones."""


@dataclass(frozen=True, slots=True)
class Reply:
    """``data`` is a pickled result; ``text`` is a traceback."""

    status: Literal["ok", "error"]
    data: bytes = b""
    text: str = ""


def main() -> None:
    pipe, rank, num_ranks = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folder = Path(sys.argv[4])
    with (
        Connection(pipe) as connection,
        (folder / f"stacks.{rank}").open("w") as stacks,
    ):
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=num_ranks,
            timeout=GROUP_TIMEOUT,
        )
        _serve(connection, rank, num_ranks)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for peers, as destroying the groups would


def _serve(connection: Connection, rank: int, num_ranks: int) -> None:
    groups = _make_groups(num_ranks)
    connection.send(Reply("ok"))
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        if job is None:
            return
        if isinstance(job, Regroup):
            groups = _make_groups(num_ranks)
            connection.send(Reply("ok"))
        else:
            connection.send(_answer(job, groups[job.world_size], rank))


def _make_groups(num_ranks: int) -> dict[int, object]:
    sizes = range(1, num_ranks + 1)
    return {n: dist.new_group(range(n), timeout=GROUP_TIMEOUT) for n in sizes}


def _answer(job: Job, group: object, rank: int) -> Reply:
    try:
        _forget_earlier_jobs()
        importlib.import_module(job.module)
        function, args = pickle.loads(job.call)
        # Not Connection.send, which would share a tensor's memory instead of its data.
        return Reply("ok", data=pickle.dumps(function(group, rank, *args)))
    except BaseException:  # a rank that exits or is interrupted must be heard of too
        return Reply("error", text=traceback.format_exc())


def _forget_earlier_jobs() -> None:
    random.seed(0)
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()


def _die_with(parent: int) -> None:
    """End this process when the test run has died, even inside a collective."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
