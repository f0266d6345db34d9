"""A mesh or process group turned into what the compiler needs to know: ``Ranks``.

Invariant: a ``Ranks`` is plain data; nothing after this module asks torch for a rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringcompile.errors import OptionError

RING_AND_ULYSSES = ("ring", "ulysses")
"""The dims of a mesh whose ranks deal out heads in small groups, between which KV go
round."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that share one sequence, as this process sees them.

    Attributes:
        rank: cp rank of this process.
        size: cp size, P.
        group_name: Name that functional collectives know the group by; "" if alone.
        device_type: ``cuda`` if the group moves CUDA tensors, else ``cpu``.
        ulysses_size: how many ranks, one after the other, deal out heads among
            themselves; the ring goes over groups of so many. None: what costs least.
    """

    rank: int = 0
    size: int = 1
    group_name: str = ""
    device_type: str = "cpu"
    ulysses_size: int | None = None

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank, so that nothing need be cut."""
        return self.size == 1


def find_ranks(mesh: object = None) -> Ranks:
    """Describe the context-parallel group that the option ``mesh`` names.

    Args:
        mesh: 1-D ``DeviceMesh``, one of the dims ``("ring", "ulysses")``, a process
            group, or None for the default group.

    Returns:
        The ranks; one lone rank if the group has one member, or if ``mesh`` is None
        and no process group is initialized.

    Raises:
        OptionError: the mesh has other dims, or this process has no place in it.
    """
    group = find_group(mesh)
    if group is None:
        return Ranks()
    ulysses_size = None
    if isinstance(mesh, DeviceMesh) and mesh.mesh_dim_names == RING_AND_ULYSSES:
        ulysses_size = mesh.size(1)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise _not_a_member("a process group")
    if size == 1:
        return Ranks()
    device_type = _find_device_type(group)
    return Ranks(rank, size, group.group_name, device_type, ulysses_size)


def find_group(mesh: object = None) -> dist.ProcessGroup | None:
    """The process group that the option ``mesh`` names; None where there is none."""
    if mesh is None:
        ready = dist.is_available() and dist.is_initialized()
        return dist.group.WORLD if ready else None
    if isinstance(mesh, DeviceMesh):
        return _find_mesh_group(mesh)
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if mesh is dist.GroupMember.NON_GROUP_MEMBER:
        raise _not_a_member("a process group")
    raise OptionError(
        f"mesh={mesh!r}",
        at="options",
        because=f"a {type(mesh).__name__} is neither a DeviceMesh nor a process group",
        instead='for example {"mesh": device_mesh["cp"]}',
    )


def _find_mesh_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    names = mesh.mesh_dim_names
    if mesh.ndim != 1 and names != RING_AND_ULYSSES:
        raise OptionError(
            f"mesh={mesh!r}",
            at="options",
            because=f"of {mesh.ndim} mesh dims none is known to cut the sequence; two"
            " may, if they are called ring and ulysses, in that order: ranks that deal"
            " out heads are neighbours",
            instead=f"one mesh dim of it: mesh[{names[-1]!r}]"
            if names
            else "a 1-D mesh: one with mesh_dim_names can be indexed by name",
        )
    if mesh.get_coordinate() is None:
        raise _not_a_member(f"mesh {mesh!r}")
    if mesh.ndim == 1:
        return mesh.get_group()
    order = mesh.mesh.flatten().tolist()
    if order != sorted(order):
        raise OptionError(
            f"mesh={mesh!r}",
            at="options",
            because="the ranks of a process group are in ascending order, and here"
            f" they are {order}: others than those of the mesh would deal out heads",
            instead='init_device_mesh(..., mesh_dim_names=("ring", "ulysses"))',
        )
    world = dist.group.WORLD
    if world is not None and world.size() == len(order):
        return world
    return mesh._flatten().get_group()  # noqa: SLF001 - torch's tutorials call it so


def _not_a_member(what: str) -> OptionError:
    return OptionError(
        f"mesh: {what} without this process",
        at="options",
        because="every process that compiles holds a part of the sequence",
        instead="compile only on members, or pass the mesh this process belongs to",
    )


def _find_device_type(group: dist.ProcessGroup) -> str:
    has_cuda = "cuda" in dist.get_backend_config(group)
    return "cuda" if has_cuda and torch.cuda.is_available() else "cpu"
