"""What a pattern's sparsity gains over dense causal attention, on one device.

    python benchmarks/patterns.py --tokens 4096 --heads 4
    python benchmarks/patterns.py --device cuda --tokens 32768 --heads 32 --kv-heads 8

Every variant runs in the same process, one after the other in each round; a figure is
the median over rounds of forward and backward. ``share`` is the speed-up over dense
divided by that of the pairs that are computed: 1 is all that sparsity promises.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

import ringcompile  # noqa: F401 - the backend, in a checkout that is not installed
from ringcompile.patterns import (
    GlobalLocal,
    LocalWindow,
    LongNet,
    MaskPattern,
    Pattern,
    Sinks,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One variant.

    Attributes:
        name: what it is called.
        call: forward and backward.
        share: pairs it computes over those of dense causal attention.
    """

    name: str
    call: Callable[[], None]
    share: float


def main() -> None:
    """Time dense attention and the patterns; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=None)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kernel", choices=("auto", "math"), default="auto")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(
        f"torch {torch.__version__}, {where}, {_dtype(args)}, {args.tokens} tokens,"
        f" {args.heads}:{args.kv_heads} heads of {args.head_size},"
        f" kernel={args.kernel}"
    )
    rows = _build_rows(args)
    seconds = _time_rounds(rows, args.rounds)
    dense = median(seconds[rows[0].name])
    print(f"{'pattern':44} {'ms':>9} {'pairs':>7} {'speed-up':>9} {'share':>6}")
    for row in rows:
        value = median(seconds[row.name])
        gain = dense / value
        print(
            f"{row.name:44} {1000 * value:9.2f} {row.share:7.3f} {gain:8.2f}x"
            f" {gain * row.share:6.2f}"
        )


def _dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.device == "cuda" else torch.float32


def _build_rows(args: argparse.Namespace) -> list[Row]:
    S, H, G, D = args.tokens, args.heads, args.kv_heads, args.head_size
    random = torch.Generator(args.device).manual_seed(0)
    options = {"generator": random, "device": args.device, "dtype": _dtype(args)}
    q, k, v, grad = (torch.randn(1, n, S, D, **options) for n in (H, G, G, H))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def build(pattern: Pattern | None) -> Callable[[], None]:
        compiled = torch.compile(_attend, backend="inductor")
        if pattern is not None:
            given = {"attention": pattern, "kernel": args.kernel}
            compiled = torch.compile(_attend, backend="ring", options=given)
        torch.compiler.reset()

        def call() -> None:
            torch.autograd.grad(compiled(*inputs), inputs, grad)

        return call

    patterns: tuple[LongNet | MaskPattern, ...] = (
        LongNet((S // 16, S // 4, S), (1, 4, 16), offset="kv_head"),
        LongNet((S // 16,), (1,)),
        LocalWindow(S // 8, 128),
        GlobalLocal(2, S // 16, 128),
        Sinks(64, S // 32),
    )
    rows = [Row("dense causal", build(None), 1.0)]
    return rows + [Row(str(p), build(p), _share(p, S)) for p in patterns]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    enable_gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        *(q, k, v), is_causal=True, enable_gqa=enable_gqa
    )


def _share(pattern: LongNet | MaskPattern, length: int) -> float:
    """Pairs that are computed over those of a causal mask."""
    if isinstance(pattern, MaskPattern):
        return pattern.density(length, is_causal=True)
    sizes = zip(pattern.segments, pattern.rates, strict=True)
    return sum(segment / rate**2 for segment, rate in sizes) / length


def _time_rounds(rows: list[Row], rounds: int) -> dict[str, list[float]]:
    """Seconds of each row in each round, after two that are not counted."""
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for number in range(-2, rounds):
        for row in rows:
            _synchronize()
            start = perf_counter()
            row.call()
            _synchronize()
            if number >= 0:
                seconds[row.name].append(perf_counter() - start)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
