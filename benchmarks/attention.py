"""Causal attention over a sequence that is cut across GPUs, beside its peers.

    torchrun --nproc-per-node 2 benchmarks/attention.py --json attention.json
    torchrun --nproc-per-node 2 benchmarks/attention.py --device cpu --tokens 256

Useful TFLOP/s per GPU of forward and backward, bfloat16, B = 1, D = 128, random data,
medians of ``--rounds``, the slowest rank's. A graph has four attentions, as that of a
model has its layers', each of inputs of its own; times are of one of them. ``E``
divides by the TFLOP/s of one GPU's own cuDNN kernel at 32k causal in the same run. A
peer that does not run gives its error. Rows that the file has already are not measured
again, and keep the E of their own run; errors are tried again. On CPU it is float32, by
torch's own kernel, at the first length: a way to debug, not to measure.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.nn.attention import SDPBackend, sdpa_kernel

import ringcompile  # noqa: F401 - the backend, in a checkout that is not installed

D = 128
ONE_GPU_TOKENS = 32768
_ATTENTIONS = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured.

    Attributes:
        heads: of q.
        kv_heads: of k and v.
        tokens: per rank.
        num_ranks: ranks that share the sequence.
    """

    heads: int
    kv_heads: int
    tokens: int
    num_ranks: int

    @property
    def tflop(self) -> float:
        """Useful work of one rank's forward: half of all pairs, two products."""
        total = self.tokens * self.num_ranks
        return 4 * total**2 / 2 * self.heads * D / self.num_ranks / 1e12

    def __str__(self) -> str:
        return (
            f"{self.heads}:{self.kv_heads} heads, {self.tokens} tokens"
            f" x {self.num_ranks}"
        )


@dataclass(frozen=True, slots=True)
class Call:
    """Forward, and the tensors that have gradients."""

    forward: Callable[[], tuple[Tensor, ...]]
    inputs: list[Tensor]


Peer = Callable[[Sizes, DeviceMesh], AbstractContextManager[Call]]


def _random(sizes: Sizes, mesh: DeviceMesh, tokens: int) -> list[Tensor]:
    """q, k and v of that many tokens, for each attention."""
    on_gpu = mesh.device_type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    generator = torch.Generator(mesh.device_type).manual_seed(0)
    return [
        torch.randn(
            *(1, n, tokens, D),
            generator=generator,
            device=mesh.device_type,
            dtype=dtype,
        )
        for n in (sizes.heads, sizes.kv_heads, sizes.kv_heads) * _ATTENTIONS
    ]


def _attend(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        for q, k, v in zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True)
    )


@contextmanager
def _one_gpu(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
    inputs = [x.requires_grad_() for x in _random(sizes, mesh, sizes.tokens)]
    with _cudnn(mesh):
        yield Call(lambda: _attend(*inputs), inputs)


def _ring(**options: object) -> Peer:
    @contextmanager
    def enter(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
        torch.compiler.reset()
        inputs = [x.requires_grad_() for x in _random(sizes, mesh, sizes.tokens)]
        given = {"inputs": "sharded", "layout": "zigzag", **options}
        for x in inputs:  # as activations in a graph have, which is a whole model's
            torch._dynamo.mark_static_address(x)  # noqa: SLF001 - its public name
        compiled = torch.compile(_attend, backend="ring", dynamic=True, options=given)
        yield Call(lambda: compiled(*inputs), inputs)

    return enter


def _context_parallel(rotate: str) -> Peer:
    @contextmanager
    def enter(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
        inputs = _random(sizes, mesh, sizes.tokens * sizes.num_ranks)
        set_rotate_method(rotate)
        with ExitStack() as stack:
            stack.enter_context(
                context_parallel(
                    mesh, buffers=inputs, buffer_seq_dims=[2] * len(inputs)
                )
            )
            stack.enter_context(_cudnn(mesh))
            stack.callback(lambda: [x.requires_grad_(False) for x in inputs])
            for x in inputs:
                x.requires_grad_()
            yield Call(lambda: _attend(*inputs), inputs)

    return enter


def _cudnn(mesh: DeviceMesh) -> Any:  # noqa: ANN401 - torch's context
    on_gpu = mesh.device_type == "cuda"
    return sdpa_kernel(
        SDPBackend.CUDNN_ATTENTION if on_gpu else SDPBackend.FLASH_ATTENTION
    )


PEERS: dict[str, Peer] = {
    "ring": _ring(),
    "ring, sends": _ring(transport="p2p"),
    "ring, CUDA graphs": _ring(inductor={"triton.cudagraphs": True}),
    "torch CP, all-to-all": _context_parallel("alltoall"),
    "torch CP, all-gather": _context_parallel("allgather"),
}


def _measure(
    call: Call,
    grads: Sequence[Tensor],
    sizes: Sizes,
    mesh: DeviceMesh,
    rounds: int,
) -> dict[str, Any]:
    """Milliseconds of forward and of both, medians, and the useful TFLOP/s."""

    def step() -> None:
        torch.autograd.grad(call.forward(), call.inputs, grads)

    times = torch.tensor(
        [_time(call.forward, mesh, rounds), _time(step, mesh, rounds)],
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
    """Median seconds of one attention of a call."""
    found = []
    for number in range(-2, rounds):
        start = _now(mesh)
        call()
        stop = _now(mesh)
        if number >= 0:
            found.append((stop - start) / _ATTENTIONS)
    return median(found)


def _now(mesh: DeviceMesh) -> float:
    """Seconds, once this rank is idle."""
    if mesh.device_type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def main() -> None:
    """Measure all rows that the file has not, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--heads", nargs="+", default=["32:8", "32:32"])
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[4096, 8192, 16384, 32768]
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(args.device, (int(os.environ["WORLD_SIZE"]),))
    rows: dict[str, dict[str, Any]] = {}
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())
    for text in args.heads:
        heads, kv_heads = map(int, text.split(":"))
        tokens = ONE_GPU_TOKENS if args.device == "cuda" else args.tokens[0]
        alone = Sizes(heads, kv_heads, tokens, 1)
        cases = [
            (name, Sizes(heads, kv_heads, n, mesh.size()))
            for n in args.tokens
            for name in args.peers
        ]
        keys = [f"{name}, {sizes}, {args.device}" for name, sizes in cases]
        missing = [key for key in keys if "both" not in rows.get(key, {})]
        if missing:
            one = _try(_one_gpu, alone, mesh, args.rounds)  # of this run
            _say(f"one GPU, {alone}", one)
        for key, (name, sizes) in zip(keys, cases, strict=True):
            if key in missing:
                row = _try(PEERS[name], sizes, mesh, args.rounds)
                if "both" in row and "both" in one:
                    row["E"] = row["both"] / one["both"]
                rows[key] = row
                _save(args.json, rows)
            _say(key, rows[key])
    dist.destroy_process_group()


def _try(peer: Peer, sizes: Sizes, mesh: DeviceMesh, rounds: int) -> dict[str, Any]:
    """A row, or the error of the first rank that has one: all ranks go on together."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        try:
            call = stack.enter_context(peer(sizes, mesh))
            grads = [torch.randn_like(out) for out in call.forward()]
            torch.autograd.grad(call.forward(), call.inputs, grads)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:3000]}
        errors: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(errors, found)
        found = next(filter(None, errors), {})
        return found or _measure(call, grads, sizes, mesh, rounds)


def _save(path: Path | None, rows: dict[str, dict[str, Any]]) -> None:
    if path and dist.get_rank() == 0:
        path.write_text(json.dumps(rows, indent=1))


def _say(key: str, row: dict[str, Any]) -> None:
    if dist.get_rank():
        return
    if "error" in row:
        print(f"{key:56} {row['error']}", flush=True)
        return
    print(
        f"{key:56} {row['forward_ms']:9.3f} {row['both_ms']:9.3f} ms"
        f" {row['forward']:6.1f} {row['backward']:6.1f} {row['both']:6.1f} TFLOP/s"
        + (f"  E {row['E']:.3f}" if "E" in row else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()
