"""What a trace of torch's profiler says of hops and kernels."""

from collections.abc import Iterable, Sequence
from typing import Any

Interval = tuple[float, float]


def split_events(events: Iterable[dict[str, Any]]) -> tuple[list[Interval], ...]:
    """When hops were on their way and when kernels ran, of a Chrome trace.

    Hops are copies between GPUs; in a trace without any, NCCL's kernels. Its sums over
    ranks are none: those of parameters' gradients end a step.
    """
    copies, sends, kernels = [], [], []
    for event in events:
        if event.get("ph") != "X":
            continue
        name, kind = event["name"], event.get("cat")
        interval = (event["ts"], event["ts"] + event["dur"])
        if "Memcpy PtoP" in name:
            copies.append(interval)
        elif name.startswith("ncclDevKernel"):
            sends += [] if "AllReduce" in name else [interval]
        elif kind == "kernel":
            kernels.append(interval)
    return copies or sends, kernels


def skip_first_step(hops: Sequence[Interval], num_steps: int) -> list[Interval]:
    """The hops of all steps but the first, which idle GPUs start at times of their own.

    Args:
        hops: of steps that are alike, one after the other.
        num_steps: how many.
    """
    assert len(hops) % num_steps == 0, f"{len(hops)} hops in {num_steps} equal steps"
    return sorted(hops)[len(hops) // num_steps :]


def find_share(hops: Sequence[Interval], kernels: Sequence[Interval]) -> float:
    """Of all hops' time what lies under a kernel; 1 if there are no hops."""
    total = sum(stop - start for start, stop in hops)
    runs = _join(kernels)
    under = sum(
        max(0.0, min(stop, b) - max(start, a)) for start, stop in hops for a, b in runs
    )
    return under / total if total else 1.0


def _join(intervals: Sequence[Interval]) -> list[Interval]:
    """Those that overlap as one."""
    joined: list[Interval] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
