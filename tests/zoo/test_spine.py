"""The spine's matrix: models x spellings x ranks, each against eager float64.

CI runs a few cells, without Inductor. The whole matrix, by hand:

    pytest -q -m slow tests/zoo/test_spine.py
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from support.compiling import Record, compile_ring
from support.ranks import RankPool
from support.spine_models import (
    SPINE,
    Outcome,
    SpineModel,
    build_model,
    find_model,
    run_reference,
    run_step,
)
from support.tolerances import assert_gradients_equal, assert_output_equal
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the matrix: a row of ``SPINE``, and how it is run."""

    name: str
    attention: str
    cp_size: int
    compiler: str = "inductor"
    num_layers: int = 2
    length: int | None = None
    layout: str = "auto"

    @property
    def model(self) -> SpineModel:
        return find_model(self.name, self.num_layers)

    def __str__(self) -> str:
        changed = [str(x) for x in (self.length,) if x] + [self.layout]
        return f"{self.name}-{self.attention}-{self.cp_size}-{'-'.join(changed)}"


def run_cell(group: ProcessGroup, rank: int, cell: Cell) -> tuple[Record, list[str]]:
    """One training step on this rank, and what is wrong with it."""
    row = cell.model
    inputs = row.make_inputs(cell.length or row.length)
    want = run_reference(row, cell.attention, inputs)
    model = build_model(row, cell.attention, torch.float32)
    options = {"layout": cell.layout}
    call, record = compile_ring(model, group, compiler=cell.compiler, options=options)
    return record, _find_faults(run_step(model, call, inputs), want)


def _find_faults(got: Outcome, want: Outcome) -> list[str]:
    checks: tuple[Callable[[], None], ...] = (
        lambda: assert_output_equal(got.loss, want.loss, "loss"),
        lambda: assert_output_equal(got.logits, want.logits, "logits"),
        lambda: assert_gradients_equal(got.grads, want.grads),
    )
    faults = []
    for check in checks:
        try:
            check()
        except AssertionError as error:
            faults.append(str(error))
    return faults


def check_cell(ranks: RankPool, cell: Cell) -> None:
    results = ranks.run(run_cell, cell, world_size=cell.cp_size)
    for rank, (record, faults) in enumerate(results):
        assert not faults, f"rank {rank}: {faults}"
        assert record.num_graphs == 1
        assert record.refused == []
        assert record.gathers == []
        assert len(record.rings) == cell.num_layers


CI_CELLS = [
    Cell("llama packed", "sdpa", 2, "aot_eager"),
    Cell("mistral", "eager", 2, "aot_eager"),
    Cell("bert padded", "eager", 2, "aot_eager"),
    Cell("llama", "sdpa", 3, "aot_eager", length=509),
]
MATRIX = [
    Cell(row.name, attention, cp_size, "aot_eager")
    for row in SPINE
    for attention in ("sdpa", "eager")
    for cp_size in (1, 2, 4)
]
INDUCTOR = [replace(c, compiler="inductor") for c in MATRIX if c.cp_size == 2]
INDUCTOR.append(Cell("llama", "sdpa", 4, num_layers=1))
INDIVISIBLE = [
    Cell(name, "sdpa", 3, "aot_eager", length=509, layout=layout)
    for name in ("llama", "bert padded", "mistral")
    for layout in ("contiguous", "zigzag", "striped")
] + [Cell("llama", "sdpa", 3, length=509)]


@pytest.mark.parametrize("cell", CI_CELLS, ids=str)
def test_a_cell_equals_eager(ranks: RankPool, cell: Cell) -> None:
    check_cell(ranks, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", MATRIX, ids=str)
def test_the_matrix_without_inductor(ranks: RankPool, cell: Cell) -> None:
    check_cell(ranks, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", INDUCTOR, ids=str)
def test_the_matrix_with_inductor(ranks: RankPool, cell: Cell) -> None:
    check_cell(ranks, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", INDIVISIBLE, ids=str)
def test_an_indivisible_length_on_three_ranks(ranks: RankPool, cell: Cell) -> None:
    check_cell(ranks, cell)
