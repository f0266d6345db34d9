"""What the compiled graphs hold: no gathered K or V, no full-length table, no S x S."""

from collections.abc import Sequence

import pytest
import torch
from support.compiling import Graph, Record, compile_ring
from support.ranks import RankPool
from support.spine_models import SPINE, SpineModel, build_model, find_model, run_step
from torch.distributed import ProcessGroup

# Divisible for P = 4 and zigzag, and unlike every other extent of the models.
LENGTH = 88
BATCH = 2
ALL_GATHER = "ringcompile.all_gather.default"


def capture(
    group: ProcessGroup, rank: int, name: str, attention: str, length: int
) -> Record:
    row = find_model(name)
    model = build_model(row, attention, torch.float32)
    call, record = compile_ring(model, group, compiler="capture")
    run_step(model, call, row.make_inputs(length))
    return record


def _length_of(row: SpineModel) -> int:
    # Chunks longer than its window at both lengths: the same schedule.
    return LENGTH * 16 if row.name == "mistral" else LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row", SPINE, ids=lambda row: row.name)
def test_graphs_hold_shards_only(
    ranks: RankPool, row: SpineModel, attention: str, cp_size: int
) -> None:
    check_graphs(ranks, row, attention, cp_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama cache", "bert padded"])
def test_graphs_hold_shards_only_on_two_ranks(ranks: RankPool, name: str) -> None:
    check_graphs(ranks, find_model(name), "eager", 2)


def check_graphs(
    ranks: RankPool, row: SpineModel, attention: str, cp_size: int
) -> None:
    length = _length_of(row)
    runs = [
        ranks.run(capture, row.name, attention, n * length, world_size=cp_size)
        for n in (1, 2, 3)
    ]
    for record in runs[0]:
        assert [g.is_backward for g in record.graphs] == [False, True]
        forward, backward = record.graphs
        _check_gathers(row, forward, backward)
        _check_full_length(record.graphs, length)
    for records in zip(*runs, strict=True):
        for graphs in zip(*(record.graphs for record in records), strict=True):
            _check_growth(*graphs)
    tags = {tuple(g.tags for g in record.graphs) for record in runs[0]}
    assert len(tags) == 1, "all ranks start the same hops in the same order"


def _check_gathers(row: SpineModel, forward: Graph, backward: Graph) -> None:
    """Only outputs are gathered: the logits, and each layer's K and V if returned."""
    num_outputs = 5 if row.name == "llama cache" else 1
    assert [v.op for v in forward.values].count(ALL_GATHER) == num_outputs
    assert ALL_GATHER not in [v.op for v in backward.values]


def _check_full_length(graphs: Sequence[Graph], length: int) -> None:
    """Full-length floats are gathered outputs or their tangents, nothing else."""
    declared = {v.size for v in graphs[0].values if v.op == ALL_GATHER}
    for graph in graphs:
        for value in graph.values:
            # On as many ranks as rows, a flattened shard is (BATCH * T = S, ...).
            is_full = BATCH * length in value.shape or (
                len(value.shape) > 2 and length in value.shape
            )
            if value.is_float and is_full:
                assert value.size in declared, value


def _check_growth(one: Graph, two: Graph, three: Graph) -> None:
    """At S, 2S and 3S what an op makes grows linearly at most.

    A constant plus S grows by less than half from 2S to 3S; S less a constant (a window)
    by the same amount each time; S squared by more than both.
    """
    sizes = [_largest(graph) for graph in (one, two, three)]
    for op in sizes[2]:
        a, b, c = (size.get(op, 0) for size in sizes)
        assert 2 * c <= 3 * b or c - b <= b - a, (op, a, b, c)


def _largest(graph: Graph) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for value in graph.values:
        op = "input" if value.op == value.name else value.op
        sizes[op] = max(value.size, sizes.get(op, 0))
    return sizes


@pytest.mark.parametrize("name", ["llama"])
def test_saved_activations_shrink_with_ranks(ranks: RankPool, name: str) -> None:
    saved = {}
    for cp_size in (2, 4):
        # Long enough that views of the weights, which are saved too, don't count.
        record = ranks.run(capture, name, "sdpa", 8 * LENGTH, world_size=cp_size)[0]
        saved[cp_size] = _saved_size(record.graphs[0])
    assert saved[4] <= 0.55 * saved[2]


def _saved_size(forward: Graph) -> int:
    """Floats that forward keeps, beside parameters and the user's outputs."""
    num_user_outputs = 2  # loss and logits
    saved = (forward.value(name) for name in forward.outputs[num_user_outputs:])
    return sum(v.size for v in saved if v.is_float and v.op != v.name)
