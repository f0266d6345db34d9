from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringcompile.errors import OptionError
from ringcompile.mesh import Ranks, find_ranks


@pytest.fixture
def rank_1_of_4() -> Iterator[None]:
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_no_process_group_is_one_lone_rank() -> None:
    assert find_ranks() == Ranks(rank=0, size=1, group_name="")
    assert find_ranks().is_alone


@pytest.mark.usefixtures("rank_1_of_4")
def test_default_group() -> None:
    ranks = find_ranks()
    assert (ranks.rank, ranks.size, ranks.device_type) == (1, 4, "cpu")
    assert ranks.group_name
    assert not ranks.is_alone
    assert find_ranks(dist.group.WORLD) == ranks


@pytest.mark.usefixtures("rank_1_of_4")
def test_1d_mesh_and_one_dim_of_a_mesh() -> None:
    assert find_ranks(init_device_mesh("cpu", (4,))).size == 4
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    ranks = find_ranks(mesh["cp"])
    assert (ranks.rank, ranks.size) == (1, 2)
    assert find_ranks(mesh.get_group("cp")) == ranks
    assert find_ranks(mesh["dp"]).rank == 0


@pytest.mark.usefixtures("rank_1_of_4")
def test_a_group_of_one_is_one_lone_rank() -> None:
    assert find_ranks(dist.new_group([1])) == Ranks()


@pytest.mark.usefixtures("rank_1_of_4")
@pytest.mark.parametrize("names", [("dp", "cp"), ("ulysses", "ring"), None])
def test_other_2d_meshes_are_refused(names: tuple[str, str] | None) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    way_out = "a 1-D mesh" if names is None else rf"mesh\['{names[1]}'\]"
    with pytest.raises(OptionError, match=f"(?s)ring and ulysses.*{way_out}"):
        find_ranks(mesh)


@pytest.mark.usefixtures("rank_1_of_4")
def test_ranks_in_another_order_are_refused() -> None:
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("ring", "ulysses"))
    with pytest.raises(OptionError, match=r"here they are \[0, 2, 1, 3\]"):
        find_ranks(mesh)


@pytest.mark.usefixtures("rank_1_of_4")
@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1)])
def test_ring_and_ulysses_are_all_ranks_of_the_sequence(shape: tuple[int, int]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))
    ranks = find_ranks(mesh)
    assert (ranks.rank, ranks.size, ranks.ulysses_size) == (1, 4, shape[1])
    assert find_ranks(mesh) == ranks


@pytest.mark.usefixtures("rank_1_of_4")
def test_a_group_without_this_process_is_refused() -> None:
    with pytest.raises(OptionError, match="without this process"):
        find_ranks(dist.new_group([0, 2]))


@pytest.mark.parametrize("mesh", ["cp", 4, object])
def test_anything_else_is_refused(mesh: object) -> None:
    with pytest.raises(OptionError, match="neither a DeviceMesh nor a process group"):
        find_ranks(mesh)
