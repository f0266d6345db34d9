"""Attention between two sequences end to end, against eager float64."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.compiling import Record, compile_ring
from support.cross_models import make_inputs, make_model, run_step
from support.ranks import RankPool
from support.sampling import slow
from support.tolerances import assert_gradients_equal, assert_output_equal
from torch.distributed import ProcessGroup

import ringcompile
from ringcompile.patterns import LocalWindow

NUM_RINGS = {"pair": 5, "decoder": 4, "checkpointed decoder": 4, "latents": 2}
NUM_RINGS |= {"pixels": 2, "cached": 1, "plain": 1, "biased": 1}


@dataclass(frozen=True, slots=True)
class Cell:
    """One model and how it is run.

    Attributes:
        name: a model of ``cross_models``.
        cp_size: number of ranks.
        lengths: of queries and of keys.
        spelling: of attention.
        options: of the backend.
        compiler: of ``compile_ring``.
        dynamic: as in ``torch.compile``.
        frozen: prefix of parameters that need no gradient.
        needs_grad: whether backward runs.
    """

    name: str
    cp_size: int
    lengths: tuple[int, int] = (41, 96)
    spelling: str = "sdpa"
    options: Mapping[str, Any] = field(default_factory=dict)
    compiler: str = "aot_eager"
    dynamic: bool | None = None
    frozen: str | None = None
    needs_grad: bool = True

    def __str__(self) -> str:
        lengths = "x".join(map(str, self.lengths))
        return f"{self.name}-{self.cp_size}-{lengths}-{self.spelling}"


def run_cell(group: ProcessGroup, _rank: int, cell: Cell) -> tuple[Record, list[str]]:
    """One step on this rank, and what is wrong with it."""
    torch.compiler.reset()
    model = make_model(cell.name, cell.spelling)
    for name, parameter in model.named_parameters():
        if cell.frozen is not None and name.startswith(cell.frozen):
            parameter.requires_grad_(False)
    double = deepcopy(model).double()
    call, record = compile_ring(
        model,
        group,
        compiler=cell.compiler,
        options=cell.options,
        dynamic=cell.dynamic,
    )
    lengths = [cell.lengths]
    if cell.dynamic:
        lengths.append((2 * cell.lengths[0], cell.lengths[1] // 2))
    faults = []
    for size in lengths:
        inputs = make_inputs(cell.name, size)
        want = run_step(double, double, inputs, needs_grad=cell.needs_grad)
        got = run_step(model, call, inputs, needs_grad=cell.needs_grad)
        try:
            assert_output_equal(got.out, want.out)
            assert_gradients_equal(got.grads, want.grads)
        except AssertionError as fault:
            faults.append(f"{size}: {fault}")
    return record, faults


def check(ranks: RankPool, cell: Cell) -> Record:
    results = ranks.run(run_cell, cell, world_size=cell.cp_size)
    for rank, (record, faults) in enumerate(results):
        assert not faults, f"rank {rank}: {faults}"
        assert record.refused == []
        assert record.gathers == []
        assert record.num_graphs == 1
        assert len(record.rings) == NUM_RINGS[cell.name]
    first: Record = results[0][0]
    return first


@pytest.mark.parametrize(
    "cell",
    [
        Cell("pair", 2, (96, 40)),
        slow(Cell("pair", 3, (41, 96), "eager")),
        slow(Cell("pair", 4, (5, 64), "grouped")),
        slow(Cell("pair", 2, (40, 40))),
        slow(Cell("pair", 1, (41, 96))),
        slow(Cell("decoder", 2, (41, 96))),
        slow(Cell("decoder", 3, (40, 40))),
        slow(Cell("decoder", 3, (96, 40), "grouped")),
        Cell("decoder", 4, (5, 64), "eager"),
        slow(Cell("decoder", 4, (64, 3))),
        Cell("checkpointed decoder", 3, (41, 96)),
        Cell("latents", 3, (12, 64)),
        slow(Cell("pixels", 3, (16, 40))),
        slow(Cell("plain", 3, (10, 17))),
        Cell("biased", 3, (10, 17)),
    ],
    ids=str,
)
def test_a_model_equals_eager(ranks: RankPool, cell: Cell) -> None:
    check(ranks, cell)


def test_keys_of_a_cache_are_put_before_the_new(ranks: RankPool) -> None:
    cell = Cell("cached", 2, (12, 25))
    for record, faults in ranks.run(run_cell, cell, world_size=2):
        assert faults == []
        assert record.refused == []
        assert record.masks == ["k <= q + 25"]
        assert {g.split(":")[0] for g in record.gathers} == {"aten.cat"}


@pytest.mark.parametrize(
    "layout", [slow("contiguous"), "zigzag", slow("striped"), slow("hilbert")]
)
def test_each_axis_has_the_asked_layout(ranks: RankPool, layout: str) -> None:
    record = check(ranks, Cell("pair", 3, (37, 64), options={"layout": layout}))
    assert record.layouts.count(f"{layout} x3, keys {layout} x3 of 64") == 2


def test_two_sequences_of_one_length_are_two_axes() -> None:
    """One is causal, the other is not; they are cut each for itself."""
    x, memory, padding = make_inputs("decoder", (1024, 1024))
    model = make_model("decoder", "sdpa").double()
    report = ringcompile.explain(model, x, memory, padding, world_size=4)
    layouts = [attention.layout for attention in report.attentions]
    assert layouts == ["zigzag x4", "zigzag x4, keys contiguous x4 of 1024"] * 2
    assert "; keys: contiguous costs least" in report.attentions[1].reason


@pytest.mark.slow
def test_compiled_by_inductor(ranks: RankPool) -> None:
    check(ranks, Cell("decoder", 2, (41, 96), compiler="inductor"))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(24, 48), (24, 44)])
def test_lengths_that_change(ranks: RankPool, lengths: tuple[int, int]) -> None:
    results = ranks.run(run_cell, Cell("decoder", 2, lengths, dynamic=True))
    for record, faults in results:
        assert faults == []
        assert record.refused == record.gathers == []


def test_one_graph_serves_lengths_that_need_no_pads(ranks: RankPool) -> None:
    cell = Cell("decoder", 2, (24, 48), compiler="eager", dynamic=True)
    assert check(ranks, cell).layouts[1] == "contiguous x2, keys contiguous x2"


@pytest.mark.parametrize("frozen", ["", "layers.0", "layers.1.cross.k"])
def test_frozen_parameters(ranks: RankPool, frozen: str) -> None:
    check(ranks, Cell("decoder", 2, (41, 20), frozen=frozen))


def test_without_gradients(ranks: RankPool) -> None:
    check(ranks, Cell("pair", 3, (41, 20), needs_grad=False))


def test_a_kernel_of_plain_operators(ranks: RankPool) -> None:
    check(ranks, Cell("pair", 2, (41, 20), options={"kernel": "math"}))


def run_bfloat16(group: ProcessGroup, _rank: int) -> tuple[float, float]:
    """Our worst error and that of eager bfloat16."""
    model = make_model("pair", "sdpa")
    double = deepcopy(model).double()
    model = model.bfloat16()
    call, _ = compile_ring(model, group, compiler="aot_eager")
    inputs = make_inputs("pair", (41, 96))
    want = run_step(double, double, inputs)

    def find_error(outs: Any) -> float:  # noqa: ANN401
        errors = [(outs.out - want.out).abs().max() / want.out.abs().max()]
        for name, grad in want.grads.items():
            if grad is None:  # of a norm that an encoder does not have
                continue
            errors.append((outs.grads[name] - grad).abs().max() / grad.abs().max())
        return float(max(errors))

    return find_error(run_step(model, call, inputs)), find_error(
        run_step(model, model, inputs)
    )


def test_bfloat16_is_as_good_as_eager(ranks: RankPool) -> None:
    for ours, eager in ranks.run(run_bfloat16, world_size=2):
        assert ours < 2 * eager


def run_pattern(group: ProcessGroup, _rank: int) -> tuple[list[str], list[str]]:
    """Masks of the rings, and warnings, where a window is asked for everywhere."""
    model = make_model("pair", "sdpa")
    options = {"attention": LocalWindow(8, block=4)}
    call, record = compile_ring(model, group, compiler="aot_eager", options=options)
    with pytest.warns(UserWarning, match="stays exact: ") as caught:
        call(*make_inputs("pair", (40, 40)))
    return record.layouts, [str(w.message) for w in caught]


def test_a_pattern_leaves_cross_attention_exact(ranks: RankPool) -> None:
    (_, warnings) = ranks.run(run_pattern, world_size=2)[0]
    assert sum("stays exact: " in w for w in warnings) == 1
    assert "attention of 40 queries over 40 keys, under a pattern" in warnings[0]
