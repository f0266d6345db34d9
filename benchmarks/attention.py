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

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measure import (
    Call,
    Peer,
    Sizes,
    make_mesh,
    make_parser,
    print_row,
    read_rows,
    save_rows,
    try_peer,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.nn.attention import SDPBackend, sdpa_kernel

import ringcompile  # noqa: F401 - the backend, in a checkout that is not installed

ONE_GPU_TOKENS = 32768
_ATTENTIONS = 4


def _attend(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        for q, k, v in zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True)
    )


@contextmanager
def _one_gpu(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
    inputs = [x.requires_grad_() for x in sizes.draw(mesh, sizes.tokens)]
    with _cudnn(mesh):
        yield Call(lambda: _attend(*inputs), inputs)


def _ring(**options: object) -> Peer:
    @contextmanager
    def enter(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
        torch.compiler.reset()
        inputs = [x.requires_grad_() for x in sizes.draw(mesh, sizes.tokens)]
        given = {"inputs": "sharded", "layout": "zigzag", **options}
        for x in inputs:  # as activations in a graph have, which is a whole model's
            torch._dynamo.mark_static_address(x)  # noqa: SLF001 - its public name
        compiled = torch.compile(_attend, backend="ring", dynamic=True, options=given)
        yield Call(lambda: compiled(*inputs), inputs)

    return enter


def _context_parallel(rotate: str) -> Peer:
    @contextmanager
    def enter(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
        inputs = sizes.draw(mesh, sizes.tokens * sizes.num_ranks)
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


def main() -> None:
    """Measure all rows that the file has not, and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--heads", nargs="+", default=["32:8", "32:32"])
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[4096, 8192, 16384, 32768]
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    args = parser.parse_args()
    mesh = make_mesh(args.device, args.last_of)
    rows = read_rows(args.json)
    for text in args.heads:
        heads, kv_heads = map(int, text.split(":"))
        tokens = ONE_GPU_TOKENS if args.device == "cuda" else args.tokens[0]
        alone = Sizes(heads, kv_heads, tokens, 1, _ATTENTIONS)
        cases = [
            (name, replace(alone, tokens=n, num_ranks=mesh.size()))
            for n in args.tokens
            for name in args.peers
        ]
        keys = [f"{name}, {sizes}, {args.device}" for name, sizes in cases]
        missing = [key for key in keys if "both" not in rows.get(key, {})]
        if missing:
            one = try_peer(_one_gpu, alone, mesh, args.rounds)  # of this run
            print_row(f"one GPU, {alone}", one)
        for key, (name, sizes) in zip(keys, cases, strict=True):
            if key in missing:
                row = try_peer(PEERS[name], sizes, mesh, args.rounds)
                if "both" in row and "both" in one:
                    row["E"] = row["both"] / one["both"]
                rows[key] = row
                save_rows(args.json, rows)
            print_row(key, rows[key])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
