"""Seconds of dense kernel calls, and the rates that the cost model reckons with.

    python benchmarks/rates.py
    python benchmarks/rates.py --device cpu --rows 128 256 512

One GPU. Each call runs alone, random data, bfloat16, D = 128, medians of ``--rounds``.
A rate is the least squares fit of relative errors: seconds = call_s + flops / rate +
elements of Q * row_s; backward has 2.5 times the flops of forward, which are counted.
``ringcompile.plan.cost`` has them, times what a GPU loses that does nothing else.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from ringcompile.lowering.tiles import dense

_D = 128
_HEADS = ((32, 8), (32, 32), (8, 2), (4, 1))


@dataclass(frozen=True, slots=True)
class Measured:
    """One call: useful flops of forward, elements of Q, seconds of both directions."""

    flops: float
    elements: float
    seconds: tuple[float, float]


def _measure(
    heads: tuple[int, int], rows: tuple[int, int], device: str, rounds: int
) -> dict[bool, Measured]:
    """By whether it is causal, which a square alone may be."""
    (H, G), (n, m) = heads, rows
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def draw(count: int, size: int) -> Tensor:
        return torch.randn(1, count, size, _D, device=device, dtype=dtype)

    q, grad, k, v = draw(H, n), draw(H, n), draw(G, m), draw(G, m)
    found = {}
    for is_causal in (False, True)[: 1 + (n == m)]:
        of_kernel = {"is_causal": is_causal, "scale": _D**-0.5}
        attend = partial(dense.attend, q, k, v, **of_kernel)
        out, lse = attend()
        tensors = (grad, q, k, v, out.to(dtype), lse)
        differentiate = partial(dense.attend_backward, *tensors, **of_kernel)
        forward, backward = (
            _time(call, device, rounds) for call in (attend, differentiate)
        )
        flops = 4 * H * n * m * _D / (1 + is_causal)
        found[is_causal] = Measured(flops, H * n * _D, (forward, backward))
    return found


def _time(call: Callable[[], object], device: str, rounds: int) -> float:
    found = []
    for number in range(-2, rounds):
        _wait(device)
        start = perf_counter()
        call()
        _wait(device)
        if number >= 0:
            found.append(perf_counter() - start)
    return median(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def fit(
    calls: Sequence[tuple[float, float]], seconds: Sequence[float]
) -> tuple[float, float, float]:
    """The rate of calls of so many flops and elements: call_s, flops/s and row_s.

    None is negative: what would be is left out.
    """
    times = torch.tensor(seconds, dtype=torch.float64)
    columns = torch.tensor([(1.0, *call) for call in calls], dtype=torch.float64)
    relative = columns / times[:, None]
    kept = [0, 1, 2]
    while True:
        # Scaled, as flops are many and calls are few.
        scale = relative[:, kept].norm(dim=0)
        wanted = torch.ones(len(times), 1, dtype=torch.float64)
        solved = torch.linalg.lstsq(relative[:, kept] / scale, wanted).solution[:, 0]
        if bool((solved >= 0).all()):
            break
        del kept[int(solved.argmin())]
    found = dict(zip(kept, (solved / scale).tolist(), strict=True))
    assert 1 in found, "seconds that do not grow with flops"
    return found.get(0, 0.0), 1 / found[1], found.get(2, 0.0)


def main() -> None:
    """Measure, fit, and print both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384]
    )
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    calls: dict[bool, list[Measured]] = {False: [], True: []}
    for heads, n, m in product(_HEADS, args.rows, args.rows):
        if max(n, m) > 2 * min(n, m):
            continue
        for is_causal, call in _measure(
            heads, (n, m), args.device, args.rounds
        ).items():
            calls[is_causal].append(call)
            told = ", ".join(f"{1e3 * x:.3f} ms" for x in call.seconds)
            print(heads, n, m, "causal" if is_causal else "full", told, flush=True)
    for is_causal, name in ((False, "full"), (True, "causal")):
        for direction in (0, 1):
            of = calls[is_causal]
            seconds = [call.seconds[direction] for call in of]
            call_s, flops, row_s = fit([(c.flops, c.elements) for c in of], seconds)
            errors = [
                abs(call_s + c.flops / flops + c.elements * row_s - s) / s
                for c, s in zip(of, seconds, strict=True)
            ]
            print(
                f"{name}, {('forward', 'backward')[direction]}: call_s {call_s:.2g},"
                f" flops {flops:.4g}, row_s {row_s:.2g};"
                f" errors: median {median(errors):.1%}, largest {max(errors):.1%}"
            )


if __name__ == "__main__":
    main()
