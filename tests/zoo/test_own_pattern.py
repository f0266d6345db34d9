"""A user's own pattern runs sharded and differentiates, as those of the package do."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankPool
from sympy import Mod
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.distributed import ProcessGroup

from ringcompile.ir.mask import (
    K,
    Mask,
    Q,
    at_least_zero,
    chunked,
    conjunction,
    disjunction,
    equals_zero,
)
from ringcompile.ir.schedule import Selection
from ringcompile.patterns import AttentionSpec, LocalWindow, MaskPattern, Parts, Pattern

B, H, G, S, D = 2, 4, 2, 43, 4


@dataclass(frozen=True)
class Comb(MaskPattern):
    """The last tokens, and keys at multiples of ``tooth``: a mask of the user's own."""

    width: int
    tooth: int

    def keeps(self, spec: AttentionSpec) -> Boolean:
        del spec
        near = conjunction(at_least_zero(Q - K), at_least_zero(K - Q + self.width))
        return disjunction(near, equals_zero(Mod(K, self.tooth)))


@dataclass(frozen=True)
class Zoom:
    """Chunks in full, and every ``rate``-th row of all: parts of the user's own."""

    size: int
    rate: int

    def build_parts(self, mask: Mask, spec: AttentionSpec) -> Parts:
        rows = (1,) * spec.num_heads
        coarse = Selection(10**6, self.rate, rows, spec.num_kv_heads)
        return ((mask & chunked(self.size), None), (mask, coarse))


def count_comb(q: Tensor, k: Tensor) -> Tensor:
    return ((k <= q) & (k >= q - 5)) | (k % 7 == 0)


def count_zoom(q: Tensor, k: Tensor) -> Tensor:
    return (q // 6 == k // 6).int() + ((q % 4 == 1) & (k % 4 == 1))


OWN: dict[str, tuple[Pattern, Callable[[Tensor, Tensor], Tensor]]] = {
    "comb": (Comb(5, 7), count_comb),
    "zoom": (Zoom(6, 4), count_zoom),
    "comb and window": (
        Comb(5, 7) & LocalWindow(8, 4),
        lambda q, k: count_comb(q, k) & ((q // 4 - k // 4).abs() <= 1),
    ),
}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the user writes: plain causal attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    """``softmax(A + log C) V``, 0 where C is 0 (SEMANTICS.md 2A)."""
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    weights: Tensor = counts * (q @ k.mT * D**-0.5).exp()
    out: Tensor = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v
    return out


def run_own(group: ProcessGroup, rank: int, name: str) -> None:
    del rank
    pattern, count = OWN[name]
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, S, D), (B, G, S, D), (B, G, S, D), (B, H, S, D))
    q, k, v, grad = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes
    )
    at = torch.arange(S)
    counts = count(at[:, None], at[None]).double().tril()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attend_dense(q, k, v, counts)
    want = (out, *torch.autograd.grad(out, inputs, grad))
    call, record = compile_ring(
        attend, group, compiler="eager", options={"attention": pattern}
    )
    out = call(q, k, v)
    got = (out, *torch.autograd.grad(out, inputs, grad))
    assert len(record.rings) == 1
    for name_of, ours, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12, name_of


@pytest.mark.parametrize("name", OWN)
def test_a_pattern_of_the_users_own(ranks: RankPool, name: str) -> None:
    ranks.run(run_own, name, world_size=2)
