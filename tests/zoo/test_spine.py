"""The spine's matrix: models x spellings x ranks, each against eager float64.

CI runs six cells with Inductor. The whole matrix, by hand:

    pytest -q -m slow tests/zoo/test_spine.py
"""

from collections.abc import Callable, Mapping
from typing import Any

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


def run_cell(
    group: ProcessGroup,
    rank: int,
    name: str,
    attention: str,
    compiler: str,
    options: Mapping[str, Any],
) -> tuple[Record, list[str]]:
    """One training step on this rank, and what is wrong with it."""
    row = find_model(name)
    inputs = row.make_inputs(options.get("length", row.length))
    chosen = {k: v for k, v in options.items() if k != "length"}
    want = run_reference(row, attention, inputs)
    model = build_model(row, attention, torch.float32)
    call, record = compile_ring(model, group, compiler=compiler, options=chosen)
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


def check_cell(
    ranks: RankPool,
    name: str,
    attention: str,
    *,
    cp_size: int,
    compiler: str,
    options: Mapping[str, Any] | None = None,
) -> list[Record]:
    row = find_model(name)
    results = ranks.run(
        run_cell, name, attention, compiler, options or {}, world_size=cp_size
    )
    for rank, (record, faults) in enumerate(results):
        assert not faults, f"rank {rank}: {faults}"
        assert record.num_graphs == 1
        assert record.refused == []
        assert record.gathers == []
        assert len(record.rings) == (row.num_attentions if cp_size > 1 else 2)
    return [record for record, _ in results]


CELLS = [
    ("llama", "sdpa", 4),
    ("mistral", "eager", 2),
    ("gpt2", "sdpa", 2),
    ("bert padded", "eager", 2),
    ("llama packed", "sdpa", 2),
    ("llama left-padded", "eager", 2),
]


@pytest.mark.parametrize(("name", "attention", "cp_size"), CELLS)
def test_a_cell_equals_eager_under_inductor(
    ranks: RankPool, name: str, attention: str, cp_size: int
) -> None:
    check_cell(ranks, name, attention, cp_size=cp_size, compiler="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row", SPINE, ids=lambda row: row.name)
def test_the_matrix_without_inductor(
    ranks: RankPool, row: SpineModel, attention: str, cp_size: int
) -> None:
    check_cell(ranks, row.name, attention, cp_size=cp_size, compiler="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row", SPINE, ids=lambda row: row.name)
def test_the_matrix_with_inductor(
    ranks: RankPool, row: SpineModel, attention: str
) -> None:
    check_cell(ranks, row.name, attention, cp_size=2, compiler="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("name", ["llama", "bert padded", "mistral"])
def test_an_indivisible_length_on_three_ranks(
    ranks: RankPool, name: str, layout: str
) -> None:
    options = {"length": 509, "layout": layout}
    check_cell(ranks, name, "sdpa", cp_size=3, compiler="aot_eager", options=options)


def test_an_indivisible_length_under_inductor(ranks: RankPool) -> None:
    check_cell(
        ranks,
        "llama",
        "sdpa",
        cp_size=3,
        compiler="inductor",
        options={"length": 509},
    )
