"""One graph for many lengths; a warm second process compiles nothing."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compiling import compile_ring
from support.ranks import RankPool
from support.sampling import slow
from support.spine_models import build_model, find_model, run_reference, run_step
from support.tolerances import assert_gradients_equal, assert_output_equal
from torch._dynamo.utils import counters
from torch.distributed import ProcessGroup

LENGTHS = (256, 384, 512, 1024)


def run_lengths(
    group: ProcessGroup, rank: int, lengths: tuple[int, ...], compiler: str
) -> int:
    """How many graphs were compiled after the first length; each length is right."""
    row = find_model("llama")
    model = build_model(row, "sdpa", torch.float32)
    call, record = compile_ring(model, group, compiler=compiler, dynamic=True)
    num_graphs = []
    for length in lengths:
        inputs = row.make_inputs(length)
        want = run_reference(row, "sdpa", inputs)
        got = run_step(model, call, inputs)
        assert_output_equal(got.loss, want.loss, "loss")
        assert_output_equal(got.logits, want.logits, "logits")
        assert_gradients_equal(got.grads, want.grads)
        num_graphs.append(record.num_graphs)
    # Dynamo may call the backend twice for the first length, to fix a float.
    return num_graphs[-1] - num_graphs[0]


@pytest.mark.parametrize("compiler", ["eager", slow("aot_eager")])
def test_one_graph_serves_many_lengths(ranks: RankPool, compiler: str) -> None:
    assert ranks.run(run_lengths, (64, 96), compiler, world_size=2) == [0, 0]


@pytest.mark.slow
def test_one_inductor_graph_serves_many_lengths(ranks: RankPool) -> None:
    assert ranks.run(run_lengths, LENGTHS, "inductor", world_size=2) == [0, 0]


def test_a_length_that_needs_pads_compiles_anew(ranks: RankPool) -> None:
    assert ranks.run(run_lengths, (64, 61), "eager", world_size=2) == [1, 1]


def run_cached(group: ProcessGroup, rank: int, folder: str) -> dict[str, Any]:
    """One step with caches in ``folder``: seconds, and what the caches say."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    counters.clear()
    row = find_model("llama")
    model = build_model(row, "sdpa", torch.float32)
    start = time.perf_counter()
    call, _ = compile_ring(model, group)
    run_step(model, call, row.make_inputs(64))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, **counters["inductor"], **counters["aot_autograd"]}


@pytest.mark.slow
def test_a_warm_second_process_compiles_nothing(tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        pool = RankPool(num_ranks=2)
        try:
            runs.append(pool.run(run_cached, str(tmp_path), timeout_s=600))
        finally:
            pool.close()
    cold, warm = runs
    sys.stderr.write(f"cold {cold}\nwarm {warm}\n")
    for rank in range(2):
        assert cold[rank].get("fxgraph_cache_miss", 0) >= 2  # forward and backward
        assert warm[rank].get("fxgraph_cache_miss", 0) == 0
        assert warm[rank].get("fxgraph_cache_bypass", 0) == 0
        assert warm[rank]["autograd_cache_hit"] == 1
