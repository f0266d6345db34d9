"""What the benchmarks compute by hand: peers' numbers, fits, searches, tables."""

import json
from pathlib import Path
from typing import Any

import measure
import predict
import pytest
import rates
import report
import torch
import torch.nn.functional as F
import traces
from by_hand import attend_by_sdpa, attend_by_tiles, attend_gathered, attend_ulysses
from memory import find_longest, fit
from support.ranks import RankPool
from support.tolerances import assert_gradients_equal, assert_output_equal
from torch import Tensor
from torch.distributed import ProcessGroup

import ringcompile

S, D = 48, 8
NAMES = ("dq", "dk", "dv")


def _attend(name: str, inputs: list[Tensor], group: ProcessGroup) -> Tensor:
    q, k, v = inputs
    if name == "ulysses":
        return attend_ulysses(q, k, v, group)
    by = {"sdpa": attend_by_sdpa, "tiles": attend_by_tiles}[name]
    return attend_gathered(q, k, v, group, by)


def run_peer(group: ProcessGroup, rank: int, name: str, kv_heads: int) -> None:
    """Compare this rank's rows with dense attention in float64."""
    random = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(2, heads, S, D, generator=random)
        for heads in (4, kv_heads, kv_heads, 4)
    ]
    layout = "contiguous" if name == "ulysses" else "zigzag"

    def cut(x: Tensor) -> Tensor:
        return ringcompile.shard(x, 2, group, layout=layout).clone()

    *inputs, grad = map(cut, whole)
    inputs = [x.requires_grad_() for x in inputs]
    out = _attend(name, inputs, group)
    grads = torch.autograd.grad(out, inputs, grad)
    q, k, v = wide = [x.double().requires_grad_() for x in whole[:3]]
    true = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wanted = torch.autograd.grad(true, wide, whole[3].double())
    assert_output_equal(out, cut(true))
    assert_gradients_equal(
        dict(zip(NAMES, grads, strict=True)),
        dict(zip(NAMES, map(cut, wanted), strict=True)),
    )


@pytest.mark.parametrize("name", ["sdpa", "tiles", "ulysses"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_peers_by_hand_are_dense_attention(
    ranks: RankPool, name: str, kv_heads: int
) -> None:
    ranks.run(run_peer, name, kv_heads, world_size=2)


@pytest.mark.parametrize("name", ["tiles", "ulysses"])
def test_peers_by_hand_on_more_ranks(ranks: RankPool, name: str) -> None:
    ranks.run(run_peer, name, 2, world_size=4)


def test_a_fit_finds_what_a_peak_is_made_of() -> None:
    keys = {
        f"ring, 2 layers, 32:8 heads, {tokens} tokens x {ranks}, cuda": tokens
        for tokens, ranks in [(4096, 4), (8192, 4), (8192, 2), (32768, 1)]
    }
    rows: dict[str, measure.Row] = {
        key: {"peak_gib": 3 + 0.25 * tokens / 1000} for key, tokens in keys.items()
    }
    rows["ring, 2 layers, 32:8 heads, 65536 tokens x 4, cuda"] = {"error": "no"}
    rows["ring, sends, 2 layers, 32:8 heads, 9 tokens x 4, cuda"] = {"peak_gib": 9.0}
    found = fit(rows, "ring", "cuda")
    assert found is not None
    assert found["a"] == pytest.approx(3)
    assert found["b"] == pytest.approx(0.25)
    assert set(found["residuals"]) == set(keys)
    assert max(map(abs, found["residuals"].values())) < 1e-9
    assert fit(rows, "ring", "cpu") is None


@pytest.mark.parametrize("limit", [1023, 1024, 1500, 1920, 4096, 13_000, 10**9])
def test_the_longest_sequence_is_found_to_an_eighth(limit: int) -> None:
    tried: list[int] = []

    def trains(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    found = find_longest(trains, 1024, 2**15)
    assert len(tried) == len(set(tried)) <= 9
    if limit < 1024:
        assert found == 0
    else:
        most = min(limit, 2**15)
        assert found <= most < found * 9 / 8 or found == most


def test_known_rows_are_kept_and_errors_are_tried_again() -> None:
    assert not measure.is_known(None)
    assert measure.is_known({"both_ms": 1.0})
    assert not measure.is_known({"error": "ImportError: no deepspeed"})
    assert measure.is_known({"error": "OutOfMemoryError: CUDA out of memory."})


ROWS: dict[str, dict[str, measure.Row]] = {
    "attention.json": {
        "ring, 32:8 heads, 8192 tokens x 2, cuda": {
            "forward": 480.2,
            "both": 500.6,
            "E": 0.904,
        },
        "torch CP, 32:8 heads, 4096 tokens x 2, cuda": {"error": "E: why\nwhere"},
        "ring, 32:8 heads, 4096 tokens x 2, cuda": {"forward": 300.0, "both": 310.0},
    },
    "memory.json": {
        "ring, 2 layers, 32:8 heads, 4096 tokens x 2, cuda": {"peak_gib": 5.0},
        "fit of ring": {"a": 3.0, "b": 0.5, "residuals": {"one": -0.25, "other": 0.1}},
        "longest of ring, 2 ranks, cuda": {"tokens": 98304},
    },
}
README = """\
# A title
<!-- attention.json -->
old
<!-- end -->
between | \\1
<!-- memory.json -->
<!-- end -->
<!-- llama.json -->
kept
<!-- end -->
after
"""
WRITTEN = """\
# A title
<!-- attention.json -->

By tokens per rank: TFLOP/s per GPU forward / forward and backward (E).

| ranks | heads |  | 4096 | 8192 |
|---|---|---|---|---|
| 2 x cuda | 32:8 | ring | 300 / 310 | 480 / 501 (0.90) |
| 2 x cuda | 32:8 | torch CP | error |  |

- torch CP: E: why

<!-- end -->
between | \\1
<!-- memory.json -->

By tokens per rank: largest GiB of a GPU.

| ranks | heads |  | 4096 |
|---|---|---|---|
| 2 x cuda | 32:8 | ring, 2 layers | 5.00 |

- fit of ring: 3.00 GiB + 0.5000 GiB per thousand tokens of a rank; \
no peak is more than 0.25 GiB off
- longest of ring, 2 ranks, cuda: 98304 tokens per rank

<!-- end -->
<!-- llama.json -->
kept
<!-- end -->
after
"""


def test_tables_are_all_that_changes_in_a_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    for name, rows in ROWS.items():
        (tmp_path / name).write_text(json.dumps(rows))
    monkeypatch.setattr(report, "plot", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["", str(tmp_path), "--readme", str(readme)])
    for _ in range(2):
        report.main()
        assert readme.read_text() == WRITTEN


def test_a_plot_is_the_same_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for path in paths:
        report.plot(ROWS, path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second


def test_a_rate_is_found_again() -> None:
    calls = [(1e9 * n, 1e6 * m) for n in (1, 4, 16) for m in (1, 3, 9)]
    seconds = [2e-5 + flops / 5e12 + 3e-12 * n for flops, n in calls]
    assert rates.fit(calls, seconds) == pytest.approx((2e-5, 5e12, 3e-12))
    # What a rate could only have by less than nothing, it has not.
    seconds = [flops / 5e12 * (1 - 1e-9 * n) for flops, n in calls]
    call_s, flops, row_s = rates.fit(calls, seconds)
    assert call_s >= 0
    assert row_s == 0
    assert flops == pytest.approx(5e12, rel=0.05)


def test_predictions_stand_beside_what_was_measured() -> None:
    """A ring of two GPUs has half of the work of a causal square, at a GPU's rate."""
    rows: dict[str, measure.Row] = {
        "ring, 32:8 heads, 32768 tokens x 2, cuda": {"both_ms": 116.0},
        "ring, Ulysses, 32:8 heads, 32768 tokens x 2, cuda": {"both_ms": 118.0},
        "torch CP, all-to-all, 32:8 heads, 32768 tokens x 2, cuda": {"both_ms": 121.0},
        "ring, 32:8 heads, 8192 tokens x 2, cuda": {"error": "out of memory"},
    }
    found = predict.compare(rows)
    assert [tokens for tokens, _, _ in found.values()] == [32768, 32768]
    (_, measured, ring), (_, _, ulysses) = found.values()
    assert measured == 116.0
    tflop = measure.Sizes(32, 8, 32768, 2).tflop
    assert 480 < 3.5 * tflop / (ring / 1e3) < 600
    assert ring < ulysses < 1.2 * ring  # the trade is paid, and hidden by nothing


def test_hops_lie_under_kernels_or_not() -> None:
    def event(name: str, start: float, seconds: float, kind: str) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": kind, "ts": start, "dur": seconds}

    events: list[dict[str, Any]] = [
        event("sdpa", 0, 10, "kernel"),
        event("merge", 9, 3, "kernel"),  # beside the first
        event("Memcpy PtoP (Device -> Device)", 5, 4, "gpu_memcpy"),  # hidden
        event("Memcpy PtoP (Device -> Device)", 11, 4, "gpu_memcpy"),  # a quarter is
        event("Memcpy DtoD (Device -> Device)", 20, 4, "gpu_memcpy"),  # no hop
        event("ncclDevKernel_AllReduce", 30, 2, "kernel"),  # neither
        {"ph": "i", "name": "a mark"},
    ]
    hops, kernels = traces.split_events(events)
    assert kernels == [(0, 10), (9, 12)]
    assert traces.find_share(hops, kernels) == (4 + 1) / (4 + 4)
    sums = event("ncclDevKernel_AllReduce", 30, 2, "kernel")
    sends = event("ncclDevKernel_SendRecv", 8, 4, "kernel")
    hops, kernels = traces.split_events([*events[:2], sends, sums])
    assert kernels == [(0, 10), (9, 12)]
    assert hops == [(8, 12)]
    assert traces.find_share([], kernels) == 1
    assert traces.skip_first_step([(8, 9), (0, 4), (5, 6), (2, 3)], 2) == [
        (5, 6),
        (8, 9),
    ]
