"""Models on a mesh of ring and ulysses, each against eager float64."""

from dataclasses import dataclass

import pytest
import torch
from support.compiling import Record, compile_ring
from support.ranks import RankPool
from support.spine_models import build_model, find_model, run_reference, run_step
from support.tolerances import assert_gradients_equal, assert_output_equal
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True, slots=True)
class Cell:
    """A row of ``SPINE`` on a mesh of 4 ranks.

    Attributes:
        name: the row.
        shape: ranks of the ring, and that deal out heads.
        dealt: how many ranks do deal out the heads of its attentions.
        attention: how the model spells it.
        layout: the option.
        length: tokens; None: the row's own.
    """

    name: str
    shape: tuple[int, int]
    dealt: int
    attention: str = "sdpa"
    layout: str = "auto"
    length: int | None = None


CI_CELLS = (Cell("llama", (2, 2), dealt=2),)
CELLS = (
    Cell("bert padded", (1, 4), dealt=4),
    Cell("llama", (2, 2), dealt=1, layout="striped"),  # neighbours' shards are none
    Cell("llama", (2, 2), dealt=2, layout="contiguous"),
    Cell("llama packed", (2, 2), dealt=2),
    Cell("llama", (1, 4), dealt=1),  # 2 KV heads
    Cell("llama", (2, 2), dealt=1, length=61),  # does not fill its shards
    Cell("mistral", (4, 1), dealt=1),
)


def run_cell(_group: ProcessGroup, _rank: int, cell: Cell) -> Record:
    row = find_model(cell.name, 2)
    inputs = row.make_inputs(cell.length or row.length)
    want = run_reference(row, cell.attention, inputs)
    model = build_model(row, cell.attention, torch.float32)
    mesh = init_device_mesh("cpu", cell.shape, mesh_dim_names=("ring", "ulysses"))
    options = {"layout": cell.layout}
    call, record = compile_ring(model, mesh, compiler="capture", options=options)
    got = run_step(model, call, inputs)
    assert_output_equal(got.loss, want.loss, "loss")
    assert_output_equal(got.logits, want.logits, "logits")
    assert_gradients_equal(got.grads, want.grads)
    return record


@pytest.mark.parametrize("cell", CI_CELLS, ids=str)
def test_a_model_on_a_mesh_equals_eager(ranks: RankPool, cell: Cell) -> None:
    check_cell(ranks, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_more_models_on_a_mesh_equal_eager(ranks: RankPool, cell: Cell) -> None:
    check_cell(ranks, cell)


def check_cell(ranks: RankPool, cell: Cell) -> None:
    records = ranks.run(run_cell, cell, world_size=4)  # a mesh is of all processes
    for record in records:
        assert record.gathers == record.refused == []
        assert record.ulysses == [cell.dealt] * len(record.rings)
    tags = [[graph.tags for graph in record.graphs] for record in records]
    assert all(other == tags[0] for other in tags)
