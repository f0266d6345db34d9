"""``doctor``: what this installation has, and whether ranks can talk to each other."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ringcompile import ops
from ringcompile.lowering.hops import Phase, Tag

PACKAGES = ("ringcompile", "torch", "transformers", "rich", "sympy", "networkx")
OPTIONAL = {
    "ringcompile": "run from a checkout, so import it to register the backend",
    "transformers": "only the demo and explain --model need it",
}
PEER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        text: how it is.
        is_well: whether the package works with it so.
    """

    name: str
    text: str
    is_well: bool = True

    def __str__(self) -> str:
        mark = "ok" if self.is_well else "BAD"
        return f"{mark:3}  {self.name}: {self.text}"


def examine() -> Iterator[Finding]:
    """Look at versions, the backend's name, process groups, and one hop over gloo."""
    yield Finding("python", platform.python_version())
    for package in PACKAGES:
        yield _find_version(package)
    known = torch.compiler.list_backends()
    yield Finding(
        'backend "ring"',
        "registered" if "ring" in known else f"torch knows only {', '.join(known)}",
        "ring" in known,
    )
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield Finding("CUDA devices", str(devices))
    if not (dist.is_available() and dist.is_gloo_available()):
        yield Finding("gloo", "torch was built without it", is_well=False)
        return
    if dist.is_initialized():
        size = dist.get_world_size()
        yield Finding("process group", f"{dist.get_backend()}, {size} ranks")
        return
    yield _try_hop()


def _find_version(package: str) -> Finding:
    try:
        return Finding(package, version(package))
    except PackageNotFoundError:
        reason = OPTIONAL.get(package)
        return Finding(
            package,
            f"not installed; {reason}" if reason else "not installed",
            is_well=reason is not None,
        )


def _try_hop() -> Finding:
    """Two ranks, each a process, send each other a row by the op that rings use."""
    with TemporaryDirectory(prefix="ringcompile-doctor-") as folder:
        try:
            spawn(_send_and_receive, (f"{folder}/store",), 2)
        except Exception as error:
            return Finding("a hop between 2 gloo ranks", str(error), is_well=False)
    return Finding("a hop between 2 gloo ranks", "arrived")


def _send_and_receive(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PEER_TIMEOUT_S),
    )
    row = torch.full((1, 1, 1, 4), float(rank))
    tag = Tag(0, Phase.FORWARD_KV, 0).encode()
    name = dist.group.WORLD.group_name if dist.group.WORLD else ""
    arrived = ops.HOP([row], [], 1 - rank, 1 - rank, [1], tag, name, PEER_TIMEOUT_S)
    row = torch.ops._c10d_functional.wait_tensor(arrived[0])  # noqa: SLF001
    if not bool((row == 1 - rank).all()):
        message = f"rank {rank} got {row.tolist()}"
        raise RuntimeError(message)
    dist.destroy_process_group()
