"""What the benchmarks of several ranks share: peers, their times, a file of rows.

Rows that the file has already are not measured again; errors are tried again.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

D = 128


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured.

    Attributes:
        heads: of q.
        kv_heads: of k and v.
        tokens: per rank.
        num_ranks: ranks that share the sequence.
        attentions: how many a call has; times are of one of them.
        share: of the causal pairs those that count.
    """

    heads: int
    kv_heads: int
    tokens: int
    num_ranks: int
    attentions: int = 1
    share: float = 1.0

    @property
    def tflop(self) -> float:
        """Useful work of one rank's forward: the pairs that count, two products."""
        total = self.tokens * self.num_ranks
        pairs = self.share * total**2 / 2
        return 4 * pairs * self.heads * D / self.num_ranks / 1e12

    def __str__(self) -> str:
        return (
            f"{self.heads}:{self.kv_heads} heads, {self.tokens} tokens"
            f" x {self.num_ranks}"
        )

    def draw(self, mesh: DeviceMesh, tokens: int) -> list[Tensor]:
        """q, k and v of that many tokens, for each attention."""
        on_gpu = mesh.device_type == "cuda"
        generator = torch.Generator(mesh.device_type).manual_seed(0)
        return [
            torch.randn(
                *(1, n, tokens, D),
                generator=generator,
                device=mesh.device_type,
                dtype=torch.bfloat16 if on_gpu else torch.float32,
            )
            for n in (self.heads, self.kv_heads, self.kv_heads) * self.attentions
        ]


@dataclass(frozen=True, slots=True)
class Call:
    """Forward, and the tensors that have gradients."""

    forward: Callable[[], tuple[Tensor, ...]]
    inputs: list[Tensor]


Peer = Callable[[Sizes, DeviceMesh], AbstractContextManager[Call]]
Row = dict[str, Any]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all of them have."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--last-of",
        type=int,
        metavar="P",
        help="be the last of P ranks that has no peers: nothing travels, so that its"
        " kernels alone are timed",
    )
    return parser


def make_mesh(device: str, last_of: int | None = None) -> DeviceMesh:
    """All ranks of ``torchrun``; or of a group in which only the last rank runs."""
    if last_of is not None:
        dist.init_process_group(
            "fake", store=FakeStore(), rank=last_of - 1, world_size=last_of
        )
        return init_device_mesh(device, (last_of,))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))


def read_rows(path: Path | None) -> dict[str, Row]:
    """What the file has."""
    return json.loads(path.read_text()) if path and path.exists() else {}


def save_rows(path: Path | None, rows: dict[str, Row]) -> None:
    """Let the first rank write them."""
    if path and _speaks():
        path.write_text(json.dumps(rows, indent=1))


def try_peer(peer: Peer, sizes: Sizes, mesh: DeviceMesh, rounds: int) -> Row:
    """A row, or the error of the first rank that has one: all ranks go on together."""
    found: Row = {}
    with ExitStack() as stack:
        try:
            call = stack.enter_context(peer(sizes, mesh))
            grads = [torch.randn_like(out) for out in call.forward()]
            torch.autograd.grad(call.forward(), call.inputs, grads)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:3000]}
        errors: list[Row] = [{}] * dist.get_world_size()
        dist.all_gather_object(errors, found)
        found = next(filter(None, errors), {})
        return found or _measure(call, grads, sizes, mesh, rounds)


def _measure(
    call: Call, grads: Sequence[Tensor], sizes: Sizes, mesh: DeviceMesh, rounds: int
) -> Row:
    """Milliseconds of forward and of both, medians, and the useful TFLOP/s."""

    def step() -> None:
        torch.autograd.grad(call.forward(), call.inputs, grads)

    times = torch.tensor(
        [_time(run, mesh, rounds) / sizes.attentions for run in (call.forward, step)],
        device=mesh.device_type,
    )
    dist.all_reduce(times, dist.ReduceOp.MAX)
    fwd, both = times.tolist()
    return {
        "forward_ms": 1e3 * fwd,
        "both_ms": 1e3 * both,
        "forward": sizes.tflop / fwd,
        "backward": 2.5 * sizes.tflop / (both - fwd),
        "both": 3.5 * sizes.tflop / both,
    }


def _time(call: Callable[[], object], mesh: DeviceMesh, rounds: int) -> float:
    """Median seconds of a call."""
    found = []
    for number in range(-2, rounds):
        start = _now(mesh)
        call()
        stop = _now(mesh)
        if number >= 0:
            found.append(stop - start)
    return median(found)


def _now(mesh: DeviceMesh) -> float:
    """Seconds, once this rank is idle."""
    if mesh.device_type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def _speaks() -> bool:
    """Whether this rank tells of all."""
    return dist.get_rank() == 0 or dist.get_backend() == "fake"


def print_row(key: str, row: Row) -> None:
    """A line, by the first rank."""
    if not _speaks():
        return
    if "error" in row:
        print(f"{key:64} {row['error']}", flush=True)
        return
    ratios = "".join(f"  {n} {row[n]:.3f}" for n in ("E", "share") if n in row)
    print(
        f"{key:64} {row['forward_ms']:9.3f} {row['both_ms']:9.3f} ms"
        f" {row['forward']:6.1f} {row['backward']:6.1f} {row['both']:6.1f} TFLOP/s"
        + ratios,
        flush=True,
    )
