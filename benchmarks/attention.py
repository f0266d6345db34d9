"""Causal attention over a sequence that is cut across GPUs, beside its peers.

    torchrun --nproc-per-node 2 benchmarks/attention.py --json attention.json
    torchrun --nproc-per-node 2 benchmarks/attention.py --device cpu --tokens 256

Useful TFLOP/s per GPU of forward and backward, bfloat16, B = 1, D = 128, random data,
medians of ``--rounds``, the slowest rank's. A graph has four attentions, as that of a
model has its layers', each of inputs of its own; times are of one of them. ``E``
divides by the TFLOP/s of one GPU's own cuDNN kernel at 32k causal in the same run, and
``of ring`` by those of the first peer, which is ours, at the same sizes in the same
run. A peer that does not run gives its error. Rows that the file has already are not
measured again, and keep the ratios of their own run. On CPU it is float32, by torch's
own kernel, at the first length: a way to debug, not to measure.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import gcd

import torch
import torch.distributed as dist
import torch.nn.functional as F
from by_hand import attend_by_sdpa, attend_by_tiles, attend_gathered, attend_ulysses
from measure import (
    Call,
    Peer,
    Row,
    Sizes,
    fill_rows,
    make_mesh,
    make_parser,
    print_row,
    relate,
    try_peer,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch_cp import compile_flex, cut_block_mask, ring_sdpa, use_cudnn

import ringcompile  # noqa: F401 - the backend, in a checkout that is not installed

ONE_GPU_TOKENS = 32768
_ATTENTIONS = 4

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _attend(*inputs: Tensor, by: Attend = _sdpa) -> tuple[Tensor, ...]:
    """``(B, T, H, D)`` of each, as models go on with."""
    outs = map(by, inputs[::3], inputs[1::3], inputs[2::3])
    return tuple(out.transpose(1, 2) for out in outs)


def _draw(sizes: Sizes, mesh: DeviceMesh) -> list[Tensor]:
    return [x.requires_grad_() for x in sizes.draw(mesh, sizes.tokens)]


@contextmanager
def _one_gpu(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
    inputs = _draw(sizes, mesh)
    with use_cudnn(mesh):
        yield Call(lambda: _attend(*inputs), inputs)


def _ring(**options: object) -> Peer:
    @contextmanager
    def enter(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
        torch.compiler.reset()
        inputs = _draw(sizes, mesh)
        given = {"inputs": "sharded", "layout": "zigzag", **options}
        for x in inputs:  # as activations in a graph have, which is a whole model's
            torch._dynamo.mark_static_address(x)  # noqa: SLF001 - its public name
        compiled = torch.compile(_attend, backend="ring", dynamic=True, options=given)
        yield Call(lambda: compiled(*inputs), inputs)

    return enter


@contextmanager
def _ring_and_ulysses(
    sizes: Sizes, mesh: DeviceMesh, *, most: int | None = None
) -> Iterator[Call]:
    """Heads over as many ranks as can share them, ``most`` at most; else as a ring."""
    size = gcd(sizes.kv_heads, sizes.num_ranks, most or sizes.num_ranks)
    shape, names = (sizes.num_ranks // size, size), ("ring", "ulysses")
    ranks = init_device_mesh(mesh.device_type, shape, mesh_dim_names=names)
    layout = "zigzag" if shape[0] > 1 else "contiguous"
    with _ring(mesh=ranks, layout=layout)(sizes, mesh) as call:
        yield call


def _context_parallel(rotate: str) -> Peer:
    @contextmanager
    def enter(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
        inputs = sizes.draw(mesh, sizes.tokens * sizes.num_ranks)
        with ring_sdpa(mesh, inputs, [2] * len(inputs), rotate):
            for x in inputs:
                x.requires_grad_()
            try:
                yield Call(lambda: _attend(*inputs), inputs)
            finally:
                for x in inputs:  # torch restores them in place
                    x.requires_grad_(False)

    return enter


@contextmanager
def _flex(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
    inputs = _draw(sizes, mesh)
    compiled = compile_flex(mesh)
    mask = cut_block_mask(
        lambda _b, _h, q, k: q >= k, sizes.tokens * sizes.num_ranks, mesh
    )
    by = partial(compiled, block_mask=mask)
    yield Call(lambda: _attend(*inputs, by=by), inputs)


@contextmanager
def _gathered(sizes: Sizes, mesh: DeviceMesh, *, attend: Attend) -> Iterator[Call]:
    inputs = _draw(sizes, mesh)
    by = partial(attend_gathered, group=mesh.get_group(), attend=attend)
    yield Call(lambda: _attend(*inputs, by=by), inputs)


@contextmanager
def _ulysses(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
    inputs = _draw(sizes, mesh)
    by = partial(attend_ulysses, group=mesh.get_group())
    with use_cudnn(mesh):
        yield Call(lambda: _attend(*inputs, by=by), inputs)


@contextmanager
def _deepspeed(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
    """Its tensors are ``(B, T, H, D)``, its kernel here the same SDPA."""
    import deepspeed  # noqa: PLC0415 - a peer, which few machines have
    from deepspeed.sequence.layer import DistributedAttention  # noqa: PLC0415

    deepspeed.init_distributed(dist_backend=dist.get_backend())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    module = DistributedAttention(attend, mesh.get_group())

    def by(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module(*(x.transpose(1, 2) for x in (q, k, v)), 0)
        return out.transpose(1, 2)

    inputs = _draw(sizes, mesh)
    with use_cudnn(mesh):
        yield Call(lambda: _attend(*inputs, by=by), inputs)


PEERS: dict[str, Peer] = {
    "ring": _ring(),
    "ring, sends": _ring(transport="p2p"),
    "ring, flex": _ring(kernel="flex"),
    "ring, CUDA graphs": _ring(inductor={"triton.cudagraphs": True}),
    "ring, Ulysses": _ring_and_ulysses,
    "ring, Ulysses of 2": partial(_ring_and_ulysses, most=2),
    "torch CP, all-to-all": _context_parallel("alltoall"),
    "torch CP, all-gather": _context_parallel("allgather"),
    "torch CP, flex": _flex,
    "all-gather + SDPA": partial(_gathered, attend=attend_by_sdpa),
    "all-gather + cuDNN": partial(_gathered, attend=attend_by_tiles),
    "Ulysses by hand": _ulysses,
    "DeepSpeed Ulysses": _deepspeed,
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
    one_tokens = ONE_GPU_TOKENS if args.device == "cuda" else args.tokens[0]

    @cache
    def measure_one(heads: int, kv_heads: int) -> Row:
        sizes = Sizes(heads, kv_heads, one_tokens, 1, _ATTENTIONS)
        row = try_peer(_one_gpu, sizes, mesh, args.rounds)
        print_row(f"one GPU, {sizes}", row)
        return row

    @cache
    def measure(name: str, sizes: Sizes) -> Row:
        row = try_peer(PEERS[name], sizes, mesh, args.rounds)
        relate(row, "E", partial(measure_one, sizes.heads, sizes.kv_heads))
        if name != "ring":
            relate(row, "of ring", partial(measure, "ring", sizes))
        return row

    cases = {
        f"{name}, {sizes}, {args.device}": partial(measure, name, sizes)
        for heads in args.heads
        for n in args.tokens
        for sizes in [Sizes(*map(int, heads.split(":")), n, mesh.size(), _ATTENTIONS)]
        for name in args.peers
    }
    fill_rows(args, mesh, cases)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
