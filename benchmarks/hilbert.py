r"""Natural order against the Hilbert curve: layouts over ranks, and blocks of a tile.

    python benchmarks/hilbert.py --tokens 4096 --ranks 4
    python benchmarks/hilbert.py --device cuda --tokens 16384 --ranks 2

Every variant runs in the same process, one after the other in each round; a figure is
the median over rounds of forward and backward of one causal attention. How often a
GPU's L2 cache is hit, a profiler tells, of one order at a time:

    ncu --profile-from-start off --cache-control none --clock-control none --csv \
        --metrics lts__t_sectors_lookup_hit.sum,lts__t_sectors.sum \
        python benchmarks/hilbert.py --device cuda --tokens 16384 --profile hilbert \
        > hilbert.csv
    python benchmarks/hilbert.py --read hilbert.csv
"""

import argparse
import csv
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--profile", choices=ORDERS, help="run this order alone, once")
    parser.add_argument("--read", type=Path, help="sum up what ncu wrote")
    args = parser.parse_args()
    if args.read:
        _print_hit_rate(args.read)
        return
    torch.set_num_threads(1)
    masks = {"causal": Mask(causal()), "window": Mask(causal()) & window(511)}
    if args.profile:
        _profile(args, masks["causal"])
        return
    where, transport = "CPU, one thread a rank", "gloo"
    if args.device == "cuda":
        where, transport = torch.cuda.get_device_name(), "NCCL"
    print(
        f"torch {torch.__version__}, {where}, {_dtype(args)},"
        f" {args.tokens} tokens, {args.heads} heads of {args.head_size}"
    )
    print("\norder of blocks, one rank, masked kernel")
    for name, mask in masks.items():
        tensors = _make_tensors(args, args.tokens, 0)
        calls = {o: partial(_attend_blocks, tensors, mask, o) for o in ORDERS}
        _print_rows(name, _time_rounds(calls, args.rounds))
    print(f"\nlayout, {args.ranks} ranks over {transport}, causal, the slowest rank")
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
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
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


def _dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.float32 if args.device == "cpu" else torch.bfloat16


def _make_tensors(args: argparse.Namespace, rows: int, rank: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, ``(1, H, rows, D)``."""
    device = torch.device(args.device, rank if args.device == "cuda" else None)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, args.heads, rows, args.head_size)
    options = {"generator": generator, "device": device, "dtype": _dtype(args)}
    return [torch.randn(shape, **options) for _ in range(4)]


def _profile(args: argparse.Namespace, mask: Mask) -> None:
    """One forward and backward between the profiler's start and stop."""
    tensors = _make_tensors(args, args.tokens, 0)
    _attend_blocks(tensors, mask, args.profile)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    _attend_blocks(tensors, mask, args.profile)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _print_hit_rate(file: Path) -> None:
    """Sectors found in the L2 cache over all sectors asked for, of all kernels."""
    lines = file.read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith('"ID"'))
    sums: dict[str, float] = {}
    for row in csv.DictReader(lines[first:]):
        name, value = row["Metric Name"], row["Metric Value"].replace(",", "")
        sums[name] = sums.get(name, 0.0) + float(value)
    hits, total = sums["lts__t_sectors_lookup_hit.sum"], sums["lts__t_sectors.sum"]
    print(f"{file.stem}: L2 hit rate {hits / total:.1%} of {total:.4g} sectors")


def _attend_blocks(tensors: list[Tensor], mask: Mask, order: str) -> None:
    q, k, v, grad = tensors
    at = torch.arange(q.shape[2], device=q.device)[None]
    scale = q.shape[3] ** -0.5
    options = {"mask": format_mask(mask), "scale": scale, "block_order": order}
    out, lse = ops.MASKED_ATTENTION(q, k, v, at, at, [], [], **options)
    ops.MASKED_ATTENTION_BACKWARD(grad, q, k, v, out, lse, at, at, [], [], **options)


def _run_rank(rank: int, store: str, args: argparse.Namespace) -> None:
    """One rank: every layout in each round, all ranks in step."""
    torch.set_num_threads(1)
    backend = "gloo"
    if args.device == "cuda":
        backend = "nccl"
        torch.cuda.set_device(rank)
    dist.init_process_group(
        *(backend, f"file://{store}", timedelta(minutes=10)),
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
    *inputs, grad = _make_tensors(args, layout.shard_size(args.tokens), rank)

    def call() -> None:
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        ops.RING_ATTENTION(q, k, v, [], [], plan=plan).backward(grad)
        dist.barrier()

    return call


if __name__ == "__main__":
    main()
