"""Sparse attention over a sequence that is cut across GPUs, beside its peers.

    torchrun --nproc-per-node 2 benchmarks/sparse.py --json sparse.json
    torchrun --nproc-per-node 2 benchmarks/sparse.py --device cpu --tokens 1024

Useful TFLOP/s per GPU as in attention.py, of the pairs that count; four attentions in a
graph. ``share`` is the speed-up over the dense causal ring of the same run, divided by
what the pairs that count promise: 1 is all that sparsity can give. Past 65,536 tokens
per rank dense attention takes minutes, and nothing is compared with it. Documents have
other bounds in each call, of twelve drawn before, and what is made of them (torch's
block mask) is timed with it. Each has an eighth of the sequence, one with another: so
long, striped shards share them evenly and zigzag ones do not; short ones have fewer
blocks of pairs in zigzag.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import cycle

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
from torch.distributed.device_mesh import DeviceMesh
from torch_cp import compile_flex, cut_block_mask

import ringcompile
from ringcompile import patterns as p

_BATCHES = 12
_DOCUMENTS = 8  # that a sequence has, one with another
_BLOCK = 128
_MOST_DENSE_TOKENS = 65536
_ATTENTIONS = 4


def _attend(*inputs: Tensor) -> tuple[Tensor, ...]:
    """``(B, T, H, D)`` of each q, k and v, as models go on with."""
    outs = []
    for q, k, v in zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True):
        torch._check(q.shape[2] == k.shape[2])  # noqa: SLF001 - its public name
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outs.append(out.transpose(1, 2))
    return tuple(outs)


def _attend_documents(ids: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The same over documents; a mask for all."""
    at = torch.arange(ids.shape[1], device=ids.device)
    mask = (ids[:, None, :, None] == ids[:, None, None]) & (at[:, None] >= at)
    outs = []
    for q, k, v in zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True):
        torch._check(q.shape[2] == k.shape[2] == ids.shape[1])  # noqa: SLF001
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        outs.append(out.transpose(1, 2))
    return tuple(outs)


def _draw_batches(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Tensor]:
    """Numbers of documents, ``(1, S)`` each, the same on all ranks, over and over."""
    total = sizes.tokens * sizes.num_ranks
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        starts = torch.randint(0, total, (_DOCUMENTS - 1, 1), generator=generator)
        ids = (torch.arange(total) >= starts).sum(0, keepdim=True)
        return ids.to(mesh.device_type)

    return cycle([draw() for _ in range(_BATCHES)])


def _share_of_documents(total: int) -> float:
    """Expected share of causal pairs that are of one document."""
    x = torch.arange(1, total + 1, dtype=torch.float64)
    return float(
        ((1 - x / total) ** (_DOCUMENTS - 1) * (total - x)).sum() * 2 / total**2
    )


@contextmanager
def _ring(
    sizes: Sizes, mesh: DeviceMesh, *, layout: str = "zigzag", **options: object
) -> Iterator[Call]:
    torch.compiler.reset()
    inputs = [x.requires_grad_() for x in sizes.draw(mesh, sizes.tokens)]
    given = {"inputs": "sharded", "layout": layout, **options}
    compiled = torch.compile(_attend, backend="ring", dynamic=True, options=given)
    yield Call(lambda: compiled(*inputs), inputs)


@contextmanager
def _ring_documents(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
    torch.compiler.reset()
    inputs = [x.requires_grad_() for x in sizes.draw(mesh, sizes.tokens)]
    given = {"inputs": "sharded", "layout": "striped"}
    compiled = torch.compile(
        _attend_documents, backend="ring", dynamic=True, options=given
    )
    batches = _draw_batches(sizes, mesh)

    def forward() -> tuple[Tensor, ...]:
        ids = next(batches)
        mine = ringcompile.shard(ids, 1, layout="striped", mesh=mesh).contiguous()
        return compiled(mine, *inputs)

    yield Call(forward, inputs)


@contextmanager
def _flex_documents(sizes: Sizes, mesh: DeviceMesh) -> Iterator[Call]:
    inputs = [x.requires_grad_() for x in sizes.draw(mesh, sizes.tokens)]
    compiled = compile_flex(mesh)
    batches = _draw_batches(sizes, mesh)
    total = sizes.tokens * sizes.num_ranks
    known = torch.zeros(1, total, dtype=torch.int64, device=mesh.device_type)

    def mask_mod(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (known[0, q] == known[0, k]) & (q >= k)

    def forward() -> tuple[Tensor, ...]:
        known.copy_(next(batches))
        mask = cut_block_mask(mask_mod, total, mesh)
        each = zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True)
        return tuple(compiled(*qkv, mask).transpose(1, 2) for qkv in each)

    yield Call(forward, inputs)


def _patterns(total: int) -> dict[str, tuple[p.LongNet | p.MaskPattern, str]]:
    """What is put on top of a causal mask, and the layout that suits it."""
    return {
        "window 4096": (p.DilatedWindow(4095), "contiguous"),
        "dilated window 1024 x 4": (p.DilatedWindow(1024, 4), "striped"),
        "LongNet": (
            p.LongNet((2048, 8192, 32768), (1, 4, 16), offset="kv_head"),
            "contiguous",
        ),
        "local window, blocks": (
            p.LocalWindow(max(total // 16, _BLOCK), _BLOCK),
            "contiguous",
        ),
        "BigBird, 10 %": (_big_bird(total, 0.10), "contiguous"),
        "BigBird, 5 %": (_big_bird(total, 0.05), "contiguous"),
    }


def _big_bird(total: int, density: float) -> p.BigBird:
    """Of about that density; ``with_density`` finds it, but takes minutes."""
    window_blocks = max(1, int(density * total / _BLOCK) - 3) | 1
    return p.BigBird(window_blocks, 2, 1, _BLOCK)


def _share_of(pattern: p.LongNet | p.MaskPattern, total: int) -> float:
    """Of the causal pairs those that count."""
    if isinstance(pattern, p.MaskPattern):
        return pattern.density(total, is_causal=True)
    sizes = zip(pattern.segments, pattern.rates, strict=True)
    return sum(segment / rate**2 for segment, rate in sizes) / total


def _list_peers(total: int) -> dict[str, tuple[Peer, Callable[[], float]]]:
    """What is measured at that length, and the share of its pairs that count."""
    of_documents = partial(_share_of_documents, total)
    return {
        "documents": (_ring_documents, of_documents),
        "documents, torch flex CP": (_flex_documents, of_documents),
    } | {
        name: (
            partial(_ring, layout=layout, attention=pattern),
            partial(_share_of, pattern, total),
        )
        for name, (pattern, layout) in _patterns(total).items()
    }


def main() -> None:
    """Measure all rows that the file has not, and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--heads", default="32:8")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 32768])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    args = parser.parse_args()
    mesh = make_mesh(args.device, args.last_of)

    @cache
    def measure_dense(sizes: Sizes) -> Row:
        row = try_peer(_ring, sizes, mesh, args.rounds)
        print_row(f"dense causal ring, {sizes}", row)
        return row

    def measure(peer: Peer, dense: Sizes, share_of: Callable[[], float]) -> Row:
        sizes = replace(dense, share=share_of())
        row = try_peer(peer, sizes, mesh, args.rounds)
        if dense.tokens <= _MOST_DENSE_TOKENS:
            relate(row, "share", partial(measure_dense, dense))
        return row

    cases = {}
    for tokens in args.tokens:
        heads = map(int, args.heads.split(":"))
        dense = Sizes(*heads, tokens, mesh.size(), _ATTENTIONS)
        for name, (peer, share_of) in _list_peers(tokens * mesh.size()).items():
            if any(part in name for part in args.only):
                cases[f"{name}, {dense}, {args.device}"] = partial(
                    measure, peer, dense, share_of
                )
    fill_rows(args, mesh, cases)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
