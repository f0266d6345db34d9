"""By which road hops travel: all ranks of a group take the same one."""

import socket
from collections.abc import Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ringcompile.errors import OptionError
from ringcompile.lowering.transports import driver
from ringcompile.lowering.transports.copy_engine import CopyEngine
from ringcompile.mesh import Ranks
from ringcompile.torch_private import (
    allocate_symmetric,
    can_share_memory,
    find_group,
)

_T = TypeVar("_T")

_engines: WeakKeyDictionary[dist.ProcessGroup, CopyEngine | None] = WeakKeyDictionary()


def prepare_transport(
    asked: str, ranks: Ranks, example_inputs: Sequence[object]
) -> None:
    """Make what hops need, before the first of them; every rank must come.

    Copies between GPUs of one host run at 207 GB/s for 4 MB and 371 for 512, NCCL's
    sends at 22 and 323, and those take SMs from the kernels beside (FACTS.md section 1,
    H200): so ``auto`` takes copies wherever each GPU can read every other's memory. Not
    in a CUDA graph's warm-up, whose memory is not for what stays.

    Args:
        asked: the option ``transport``, alike on all ranks.
        ranks: of the group.
        example_inputs: of the graph, which tell its device.

    Raises:
        OptionError: copies are asked for where there are none.
    """
    if asked == "p2p" or ranks.is_alone:
        return
    is_on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in example_inputs)
    engine = None
    if is_on_gpu:
        group = find_group(ranks.group_name)
        if group not in _engines:
            _engines[group] = _make_engine(group)
        engine = _engines[group]
    if engine is None and asked == "copy_engine":
        raise OptionError(
            "transport='copy_engine'",
            at="options",
            because="not every rank's GPU can read every other's memory",
            instead="transport='auto', or 'p2p'",
        )


def find_engine(asked: str, group: dist.ProcessGroup) -> CopyEngine | None:
    """The engine that carries a group's hops; None: the group's own sends do."""
    return None if asked == "p2p" else _engines.get(group)


def _make_engine(group: dist.ProcessGroup) -> CopyEngine | None:
    """None, on all ranks, if some GPU can't read another's memory, or has none left."""
    if dist.get_backend_config(group).find("cuda:nccl") < 0:
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    if not all(_ask(group, _reaches_all(group, device))):
        return None
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    size = CopyEngine.buffer_bytes(group.size(), min(_ask(group, memory_bytes)))
    try:
        memory = allocate_symmetric(size, device)
    except RuntimeError:
        memory = None
    if not all(_ask(group, memory is not None)) or memory is None:
        return None
    return CopyEngine(group, memory)


def _reaches_all(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether this GPU reads the memory of every other rank's, each another one."""
    places = _ask(group, (socket.gethostname(), _uuid(device.index)))
    here = {_uuid(n): n for n in range(torch.cuda.device_count())}
    others = [uuid for host, uuid in places if host == socket.gethostname()]
    others.remove(_uuid(device.index))
    return (
        can_share_memory(device)
        and driver.is_here()
        and len(set(places)) == group.size() == len(others) + 1
        and all(
            uuid in here and torch.cuda.can_device_access_peer(device, here[uuid])
            for uuid in others
        )
    )


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _ask(group: dist.ProcessGroup, mine: _T) -> list[_T]:
    """What every rank says."""
    answers: list[_T] = [mine] * group.size()
    dist.all_gather_object(answers, mine, group)
    return answers
