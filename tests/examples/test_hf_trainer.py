"""The Trainer example: ten steps on a cut sequence are those of one eager rank."""

import os
import socket
from unittest import mock

import hf_trainer
import pytest
import torch.distributed as dist
from support.ranks import RankPool
from support.training import assert_curves_equal, without_codegen
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

SIZES = {"steps": 10, "length": 24, "batch": 4}


def train_with_trainer(group: ProcessGroup, rank: int, num_dp: int) -> list[float]:
    from accelerate.state import AcceleratorState  # noqa: PLC0415 - seconds to import

    mesh = init_device_mesh("cpu", (num_dp, 4 // num_dp), mesh_dim_names=("dp", "cp"))
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ, _as_by_torchrun(rank)), without_codegen() as found:
        losses = hf_trainer.train(mesh, **SIZES, compiles=True)
    assert sum(len(made.attentions) for made in found) == 2
    assert not any(made.refusals for made in found)
    AcceleratorState._reset_state(reset_partial_state=True)
    want = hf_trainer.train(None, **SIZES, compiles=False)
    assert_curves_equal(losses, want)
    return losses


def _as_by_torchrun(rank: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": socket.gethostname(),
        "MASTER_PORT": "0",
    }


@pytest.mark.slow
@pytest.mark.parametrize("num_dp", [1, 2], ids="dp={}".format)
def test_ten_steps_of_the_trainer(ranks: RankPool, num_dp: int) -> None:
    curves = ranks.run(train_with_trainer, num_dp, world_size=4)
    assert all(curve == curves[0] for curve in curves)
