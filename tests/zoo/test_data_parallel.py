"""FSDP2 and DDP beside a cut sequence: curves are those of one eager rank."""

import warnings
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import RankError, RankPool
from support.training import (
    VOCABULARY,
    assert_curves_equal,
    build_llama,
    count_rings,
    make_batches,
    ring,
    train,
    train_eager,
    without_codegen,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def shard_parameters(
    group: ProcessGroup, rank: int, shape: tuple[int, ...], by_block: bool, scale: str
) -> None:
    """FSDP2 over all ranks; the last mesh dim cuts the sequence."""
    names = ("dp", "cp")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    num_batches = 1 if len(shape) == 1 else shape[0]
    mine = 0 if num_batches == 1 else mesh["dp"].get_local_rank()
    whole = mesh if num_batches == 1 else mesh._flatten("world")
    model = build_llama()
    if by_block:
        for layer in model.model.layers:
            fully_shard(layer, mesh=whole)
    fully_shard(model, mesh=whole)
    if scale == "sum":
        for module in model.modules():
            if isinstance(module, torch.distributed.fsdp.FSDPModule):
                module.set_gradient_divide_factor(num_batches)
                module.set_force_sum_reduction_for_comms(True)  # all that gloo has
    options = {"grads": "local", "local_scale": scale}
    batches = [b.chunk(num_batches)[mine] for b in make_batches(batch=2 * num_batches)]
    with without_codegen() as found:
        losses = train(model, ring(model, mesh["cp"], options), batches)
    assert count_rings(found) == (1 if by_block else 2), "blocks share a graph"
    if num_batches > 1:
        losses = average(losses, mesh["dp"].get_group())
    assert_curves_equal(losses, train_eager(batch=2 * num_batches))


def average(losses: Sequence[float], group: ProcessGroup) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return [x / dist.get_world_size(group) for x in total.tolist()]


@pytest.mark.parametrize(
    ("shape", "by_block", "scale"),
    [
        pytest.param((4,), False, "mean", marks=pytest.mark.slow),
        ((4,), True, "mean"),
        pytest.param((4,), False, "sum", marks=pytest.mark.slow),
        pytest.param((2, 2), False, "sum", marks=pytest.mark.slow),
        pytest.param((2, 2), True, "mean", marks=pytest.mark.slow),
    ],
)
def test_fsdp2(
    ranks: RankPool, shape: tuple[int, ...], by_block: bool, scale: str
) -> None:
    ranks.run(shard_parameters, shape, by_block, scale, world_size=4)


def test_a_sum_over_ranks_of_a_part_is_refused(ranks: RankPool) -> None:
    """What runs outside of the blocks' graphs can't be divided by P."""
    with pytest.raises(RankError, match='local_scale="sum" on a part of a model'):
        ranks.run(shard_parameters, (4,), True, "sum", world_size=4)


class TwoGraphs(nn.Module):
    """Attention in the first graph, a head in the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)[:, None]
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]
        torch._dynamo.graph_break()
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def sum_local_gradients(group: ProcessGroup, rank: int, scale: str) -> None:
    (ids,) = make_batches(1)
    (want := TwoGraphs())(ids).backward()
    model = TwoGraphs()
    with without_codegen() as found:
        ring(model, group, {"grads": "local", "local_scale": scale})(ids).backward()
    assert [len(made.attentions) for made in found] == [1, 0]
    for p, q in zip(model.parameters(), want.parameters(), strict=True):
        assert p.grad is not None
        dist.all_reduce(p.grad, group=group)
        p.grad /= 1 if scale == "sum" else dist.get_world_size(group)
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_local_gradients_of_a_graph_without_attention(
    ranks: RankPool, scale: str
) -> None:
    ranks.run(sum_local_gradients, scale)


def wrap_in_ddp(
    group: ProcessGroup, rank: int, over: str, grads: str, is_split: bool
) -> list[str]:
    """DDP over ``dp`` or over all ranks of a 2 x 2 mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    rows = slice(2 * mesh["dp"].get_local_rank(), 2 * mesh["dp"].get_local_rank() + 2)
    if is_split:
        dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # type: ignore[attr-defined]
    model = build_llama()
    wrapped = DistributedDataParallel(
        model,
        process_group=mesh["dp"].get_group() if over == "dp" else None,
        bucket_cap_mb=0.01 if is_split else 25,
    )
    batches = [b[rows] for b in make_batches(batch=4)]
    call = ring(wrapped, mesh["cp"], {"grads": grads})
    with without_codegen(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = train(wrapped, call, batches)
    assert_curves_equal(average(losses, mesh["dp"].get_group()), train_eager(batch=4))
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("over", "grads"),
    [("dp", "summed"), pytest.param("all", "local", marks=pytest.mark.slow)],
)
def test_ddp_beside_context_parallel(ranks: RankPool, over: str, grads: str) -> None:
    for said in ranks.run(wrap_in_ddp, over, grads, False, world_size=4):
        assert not any("DDP" in text for text in said)


@pytest.mark.slow
def test_pieces_that_ddp_splits_off_are_right_and_told(ranks: RankPool) -> None:
    for said in ranks.run(wrap_in_ddp, "all", "local", True, world_size=4):
        assert any("optimize_ddp = False" in text for text in said)


def train_with_inductor(group: ProcessGroup, rank: int) -> None:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    model = build_llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    call = ring(model, mesh, {"grads": "local"})
    assert_curves_equal(train(model, call, make_batches()), train_eager())


@pytest.mark.slow
def test_fsdp2_with_generated_code(ranks: RankPool) -> None:
    ranks.run(train_with_inductor, world_size=4, timeout_s=600)
