"""Ranks on GPUs of this machine: one each, over NCCL, or all on one GPU, by copies.

NCCL refuses two ranks on a GPU, so there gloo carries collectives, and hops are copies
of memory that the ranks' processes share, as between GPUs. What is right there is right
between GPUs; what is fast is not told.
"""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ringcompile.lowering.transports import choose
from ringcompile.lowering.transports.copy_engine import CopyEngine
from ringcompile.torch_private import allocate_symmetric

_BUFFER_OF = 16 * 2**30  # bytes of a GPU's memory, of which its buffer is a part


def run_on_gpus(work: Callable[..., object], *args: object, num_ranks: int) -> None:
    """Call ``work(rank, *args)`` on that many ranks; the first error is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    spawn(_run, (num_ranks, port, work, args), nprocs=num_ranks)


def has_sends() -> bool:
    """Whether ranks can send each other what lies on their GPUs."""
    return dist.get_backend_config().find("cuda:nccl") >= 0


def _run(
    rank: int,
    size: int,
    port: int,
    work: Callable[..., object],
    args: Any,  # noqa: ANN401
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    is_shared = torch.cuda.device_count() < size
    device = torch.device("cuda", 0 if is_shared else rank)
    torch.cuda.set_device(device)
    if is_shared:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        dist.init_process_group("cpu:gloo,cuda:gloo", rank=rank, world_size=size)
        _make_engine(device)
    else:
        dist.init_process_group("nccl", rank=rank, world_size=size, device_id=device)
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()


def _make_engine(device: torch.device) -> None:
    """Hops by copies where the transport would not choose them."""
    group = dist.group.WORLD
    assert group is not None
    memory = allocate_symmetric(
        CopyEngine.buffer_bytes(group.size(), _BUFFER_OF), device
    )
    choose._engines[group] = CopyEngine(group, memory)
