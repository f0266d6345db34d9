"""Causal attention of a sequence that is cut over ranks, as one writes it by hand.

Peers of a ring, each of plain collectives. Those that gather keys and values have
zigzag rows, which share the work evenly; Ulysses has contiguous rows and trades them
for whole heads. All take a rank's rows, ``(B, H, T, D)`` and ``(B, G, T, D)``, and give
its rows of the output; gradients are those of the whole.
"""

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right

from ringcompile.lowering.tiles import dense

# Of queries and the keys up to them, the last of which are as many: causal attention.
AttendPrefix = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Gather(torch.autograd.Function):
    """Every rank's tensor, ``(P, ...)``; a gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ANN401
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group)
        return out.view(group.size(), *x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        out = grad.new_empty(grad.shape[1:])
        rows = grad.flatten(0, 1).contiguous()
        dist.reduce_scatter_tensor(out, rows, group=ctx.group)
        return out, None


class _Exchange(torch.autograd.Function):
    """Item i of ``x`` goes to rank i; what came from rank i is item i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ANN401
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return _exchange(grad, ctx.group), None


def _exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Tiles(torch.autograd.Function):
    """By the ring's own kernels, two tiles: the keys before all queries, the square.

    No SDPA has cuDNN's kernel for a diagonal that ends in the lower right corner.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401
        parts = [
            dense.attend(q, *kv, is_causal=is_causal, scale=q.shape[-1] ** -0.5)
            for kv, is_causal in _cut_prefix(q, k, v)
        ]
        lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
        merged = sum(out * (part - lse).exp()[..., None] for out, part in parts)
        assert isinstance(merged, Tensor), "there is a square at least"
        out = merged.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        q, k, v, out, lse = ctx.saved_tensors
        parts = [
            dense.attend_backward(
                *(grad.contiguous(), q, *kv, out, lse),
                is_causal=is_causal,
                scale=q.shape[-1] ** -0.5,
            )
            for kv, is_causal in _cut_prefix(q, k, v)
        ]
        dq = torch.stack([dq for dq, _, _ in parts]).sum(0)
        dk, dv = (torch.cat([part[i] for part in parts], dim=2) for i in (1, 2))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _cut_prefix(
    q: Tensor, k: Tensor, v: Tensor
) -> list[tuple[tuple[Tensor, Tensor], bool]]:
    """K and V before all queries, if there are some, and of the square."""
    before = k.shape[2] - q.shape[2]
    square = (k[:, :, before:], v[:, :, before:]), True
    rows = (k[:, :, :before], v[:, :, :before]), False
    return [rows, square] if before else [square]


def attend_by_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By cuDNN's kernel on GPUs that have it."""
    out: Tensor = _Tiles.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out


def attend_by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By torch's public function, which takes its flash kernel on GPUs."""
    mask: Any = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, attend: AttendPrefix
) -> Tensor:
    """Gather all keys and values, then attend from each of the rank's two chunks."""
    rank, size = group.rank(), group.size()
    mine = torch.stack([k, v])
    rows: Tensor = _Gather.apply(mine, group)  # type: ignore[no-untyped-call]
    # Each half of T in rows (P, 2, B, G, T, D) is of another chunk.
    early, late = (half.unbind() for half in rows.chunk(2, dim=4))
    keys, values = torch.cat([*early, *reversed(late)], dim=3)
    chunk_size = q.shape[2] // 2
    return torch.cat(
        [
            attend(chunk, keys[:, :, :end], values[:, :, :end])
            for chunk, end in zip(
                q.chunk(2, dim=2),
                (chunk_size * (rank + 1), chunk_size * (2 * size - rank)),
                strict=True,
            )
        ],
        dim=2,
    )


def attend_ulysses(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup) -> Tensor:
    """Trade rows for heads, attend over the whole sequence, and trade back.

    KV heads that ranks can't share evenly are repeated until they can.
    """
    size = group.size()
    times = size // gcd(size, k.shape[1])
    k, v = (x.repeat_interleave(times, 1) if times > 1 else x for x in (k, v))
    q, k, v = (_to_heads(x, group) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return _trade(out.chunk(size, dim=2), group).transpose(0, 1).flatten(1, 2)


def _to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """All rows of this rank's heads."""
    return _trade(x.chunk(group.size(), dim=1), group).movedim(0, 2).flatten(2, 3)


def _trade(parts: Sequence[Tensor], group: ProcessGroup) -> Tensor:
    """What ranks have for this one, ``(P, B, H / P, T, D)``, for a part of each."""
    traded: Tensor = _Exchange.apply(torch.stack(list(parts)), group)  # type: ignore[no-untyped-call]
    return traded
