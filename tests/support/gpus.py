"""Ranks on GPUs of this machine, one each, over NCCL."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def run_on_gpus(work: Callable[..., object], *args: object, num_ranks: int) -> None:
    """Call ``work(rank, *args)`` on that many ranks; the first error is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    spawn(_run, (num_ranks, port, work, args), nprocs=num_ranks)


def _run(
    rank: int,
    size: int,
    port: int,
    work: Callable[..., object],
    args: Any,  # noqa: ANN401
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", rank=rank, world_size=size, device_id=device)
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()
