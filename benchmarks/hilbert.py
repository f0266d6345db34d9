"""Natural order against the Hilbert curve: layouts over ranks, and blocks of a tile.

    python benchmarks/hilbert.py --tokens 4096 --ranks 4

Every variant runs in the same process, one after the other in each round; a figure is
the median over rounds of forward and backward of one causal attention. What it can't
tell is whether a GPU's cache is hit more often: that needs a profiler.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import ringcompile.lowering  # noqa: F401 - the ops' kernels
from ringcompile import ops
from ringcompile.ir.attention import RankPlan
from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask, causal, window
from ringcompile.ir.text import format_mask, format_plan
from ringcompile.plan.stages import build_schedule

LAYOUTS = ("contiguous", "zigzag", "hilbert")
ORDERS = ("natural", "hilbert")


def main() -> None:
    """Time block orders in this process, then layouts over gloo ranks; print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, CPU, one thread a rank, float32,"
        f" {args.tokens} tokens, {args.heads} heads of {args.head_size}"
    )
    print("\norder of blocks, one rank, masked kernel")
    masks = {"causal": Mask(causal()), "window": Mask(causal()) & window(511)}
    for name, mask in masks.items():
        tensors = _make_tensors(args, args.tokens)
        calls = {o: partial(_attend_blocks, tensors, mask, o) for o in ORDERS}
        _print_rows(name, _time_rounds(calls, args.rounds))
    print(f"\nlayout, {args.ranks} ranks over gloo, causal, the slowest rank")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        spawn(_run_rank, (str(store), args), nprocs=args.ranks)


def _time_rounds(
    calls: Mapping[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = perf_counter()
            call()
            if number:
                seconds[name].append(perf_counter() - start)
    return seconds


def _print_rows(label: str, seconds: dict[str, list[float]]) -> None:
    medians = {name: median(times) for name, times in seconds.items()}
    base = next(iter(medians.values()))
    for name, value in medians.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        ratio = f"{value / base:.2f}x"
        print(f"  {label:8} {name:11} {value:8.3f} s  {ratio:>6}  ({spread})")


def _make_tensors(args: argparse.Namespace, rows: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, ``(1, H, rows, D)``."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, args.heads, rows, args.head_size)
    return [torch.randn(shape, generator=generator) for _ in range(4)]


def _attend_blocks(tensors: list[Tensor], mask: Mask, order: str) -> None:
    q, k, v, grad = tensors
    at = torch.arange(q.shape[2])[None]
    scale = q.shape[3] ** -0.5
    options = {"mask": format_mask(mask), "scale": scale, "block_order": order}
    out, lse = ops.MASKED_ATTENTION(q, k, v, at, at, [], **options)
    ops.MASKED_ATTENTION_BACKWARD(grad, q, k, v, out, lse, at, at, [], **options)


def _run_rank(rank: int, store: str, args: argparse.Namespace) -> None:
    """One rank: every layout in each round, all ranks in step."""
    torch.set_num_threads(1)
    dist.init_process_group(
        *("gloo", f"file://{store}", timedelta(minutes=10)),
        rank=rank,
        world_size=args.ranks,
    )
    calls = {name: _build_ring(rank, args, name) for name in LAYOUTS}
    seconds = _time_rounds(calls, args.rounds)
    if rank == 0:
        _print_rows("causal", seconds)
    dist.destroy_process_group()


def _build_ring(rank: int, args: argparse.Namespace, name: str) -> Callable[[], None]:
    layout = Layout(name, args.ranks)
    schedule = build_schedule([(Mask(causal()), None)], layout, args.tokens)
    group, scale = dist.group.WORLD, args.head_size**-0.5
    assert group is not None, "the group is ready"
    plan = format_plan(
        RankPlan(0, name, rank, group.group_name, scale, 600.0, schedule, sources="")
    )
    *inputs, grad = _make_tensors(args, layout.shard_size(args.tokens))

    def call() -> None:
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        ops.RING_ATTENTION(q, k, v, [], plan=plan).backward(grad)
        dist.barrier()

    return call


if __name__ == "__main__":
    main()
