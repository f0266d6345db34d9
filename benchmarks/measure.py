"""What the benchmarks of several ranks share: peers, their times, a file of rows.

Rows that the file has already are not measured again; errors are tried again, except
of memory that ran out. Then peers may wait for ever for the rank that it happened to,
so that the run ends: the next one goes on behind that row. No row is started once
``--minutes`` are over. A key ends with ``32:8 heads, 4096 tokens x 2, cuda``, by which
report.py takes it apart.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
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
_OUT_OF_MEMORY = "out of memory"


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
        "--minutes",
        type=float,
        default=4.0,
        help="after which no row is started; another run goes on",
    )
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


def write_rows(path: Path | None, rows: Mapping[str, Row]) -> None:
    """All of them, or, if this process ends meanwhile, what was there before."""
    if path:
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(rows, indent=1))
        new.replace(path)


def fill_rows(
    args: argparse.Namespace, mesh: DeviceMesh, cases: Mapping[str, Callable[[], Row]]
) -> dict[str, Row]:
    """Measure the rows that the file has not, and print all of ``cases``."""
    path: Path | None = args.json
    rows = read_rows(path)
    end = perf_counter() + 60 * args.minutes
    for key, measure in cases.items():
        if not is_known(rows.get(key)):
            if largest(perf_counter() - end, mesh) > 0:  # a clock's that all go by
                print_row(key, {"error": "not measured yet: run it again"})
                continue
            try:
                rows[key] = measure()
            except Exception as error:
                write_rows(path, rows | {key: _tell(error)})
                raise
            if speaks():
                write_rows(path, rows)
        print_row(key, rows[key])
    return rows


def is_known(row: Row | None) -> bool:
    """Whether it need not be measured again."""
    return row is not None and ("error" not in row or ran_out(row))


def ran_out(row: Row) -> bool:
    """Whether memory did."""
    return _OUT_OF_MEMORY in row.get("error", "")


def relate(row: Row, name: str, other: Callable[[], Row]) -> None:
    """Say in a row how fast it is beside another of the same run."""
    if "both_ms" in row and "both_ms" in (beside := other()):
        row[name] = row["both"] / beside["both"]


def _tell(error: Exception) -> Row:
    return {"error": f"{type(error).__name__}: {error}"[:3000]}


def try_together(start: Callable[[ExitStack], Callable[[], Row]]) -> Row:
    """A row, or the error of the first rank that has one: all ranks go on together.

    Args:
        start: does all that may fail; gives what measures.
    """
    found: Row = {}
    measure: Callable[[], Row] = dict  # of a rank that has an error
    with ExitStack() as stack:
        try:
            measure = start(stack)
        except Exception as error:
            if _OUT_OF_MEMORY in str(error):
                raise
            found = _tell(error)
        errors: list[Row] = [{}] * dist.get_world_size()
        dist.all_gather_object(errors, found)
        found = next(filter(None, errors), {})
        return found or measure()


def try_peer(peer: Peer, sizes: Sizes, mesh: DeviceMesh, rounds: int) -> Row:
    """The row of an attention."""

    def start(stack: ExitStack) -> Callable[[], Row]:
        call = stack.enter_context(peer(sizes, mesh))
        grads = [torch.randn_like(out) for out in call.forward()]
        torch.autograd.grad(call.forward(), call.inputs, grads)
        return lambda: _measure(call, grads, sizes, mesh, rounds)

    return try_together(start)


def _measure(
    call: Call, grads: Sequence[Tensor], sizes: Sizes, mesh: DeviceMesh, rounds: int
) -> Row:
    """Milliseconds of forward and of both, medians, and the useful TFLOP/s."""

    def step() -> None:
        torch.autograd.grad(call.forward(), call.inputs, grads)

    fwd, both = (
        time_slowest(run, mesh, rounds) / sizes.attentions
        for run in (call.forward, step)
    )
    return {
        "forward_ms": 1e3 * fwd,
        "both_ms": 1e3 * both,
        "forward": sizes.tflop / fwd,
        "backward": 2.5 * sizes.tflop / (both - fwd),
        "both": 3.5 * sizes.tflop / both,
    }


def time_slowest(call: Callable[[], object], mesh: DeviceMesh, rounds: int) -> float:
    """Seconds of a call, the median of rounds, on the slowest rank."""
    found = []
    for number in range(-2, rounds):
        start = _now(mesh)
        call()
        stop = _now(mesh)
        if number >= 0:
            found.append(stop - start)
    return largest(median(found), mesh)


def largest(number: float, mesh: DeviceMesh) -> float:
    """The largest that a rank has."""
    x = torch.tensor(number, device=mesh.device_type, dtype=torch.float64)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def _now(mesh: DeviceMesh) -> float:
    """Seconds, once this rank is idle."""
    if mesh.device_type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def speaks() -> bool:
    """Whether this rank tells of all."""
    return dist.get_rank() == 0 or dist.get_backend() == "fake"


def print_row(key: str, row: Row) -> None:
    """A line, by the first rank."""
    if not speaks():
        return
    told = row.get("error") or "  ".join(
        f"{name} {x:.4g}" for name, x in row.items() if isinstance(x, float)
    )
    print(f"{key:64} {told}", flush=True)


def run_ranks(
    script: str, num_ranks: int, options: Sequence[str], seconds: float
) -> bool:
    """Run a script of this folder by ``torchrun``; whether it ended well, in time."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(num_ranks)]
    command += [str(Path(__file__).with_name(script)), *options]
    process = subprocess.Popen(command)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        process.wait()
        return False
