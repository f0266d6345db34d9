"""By which road hops travel: all ranks of a group take the same one."""

import socket
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ringcompile.errors import OptionError
from ringcompile.lowering.transports.copy_engine import prepare
from ringcompile.mesh import Ranks
from ringcompile.torch_private import find_group


def choose_transport(asked: str, ranks: Ranks) -> str:
    """``p2p`` or ``copy_engine``; every rank must ask.

    Copies between GPUs of one host run at 207 GB/s for 4 MB and 371 for 512, NCCL's
    sends at 22 and 323, and those take SMs from the kernels beside (FACTS.md section 1,
    H200): so ``auto`` takes copies wherever each GPU can read each other's memory.

    Args:
        asked: the option ``transport``.
        ranks: of the group.

    Raises:
        OptionError: copies are asked for where there are none.
    """
    if (
        asked == "p2p"
        or ranks.is_alone
        or (asked == "auto" and ranks.device_type != "cuda")
    ):
        return "p2p"
    if ranks.device_type == "cuda":
        group = find_group(ranks.group_name)
        if _reach_each_other(group):
            prepare(group)
            return "copy_engine"
    if asked == "auto":
        return "p2p"
    raise OptionError(
        "transport='copy_engine'",
        at="options",
        because="not every rank's GPU can read every other's memory",
        instead="transport='auto', or 'p2p'",
    )


_near: WeakKeyDictionary[dist.ProcessGroup, bool] = WeakKeyDictionary()


def _reach_each_other(group: dist.ProcessGroup) -> bool:
    """Whether all GPUs of a group are of one host and read each other's memory."""
    if "nccl" not in str(dist.get_backend(group)):
        return False
    if group not in _near:
        mine = (socket.gethostname(), torch.cuda.current_device())
        places: list[tuple[str, int] | None] = [None] * group.size()
        dist.all_gather_object(places, mine, group)
        answers: list[bool | None] = [None] * group.size()
        dist.all_gather_object(answers, _reaches(mine, places), group)
        _near[group] = all(answers)
    return _near[group]


def _reaches(mine: tuple[str, int], places: list[tuple[str, int] | None]) -> bool:
    others = [p for p in places if p is not None and p != mine]
    count = torch.cuda.device_count()
    return len(others) == len(places) - 1 and all(
        host == mine[0]
        and device < count
        and torch.cuda.can_device_access_peer(mine[1], device)
        for host, device in others
    )
