"""Float masks that the user passes in are added as they are, whatever they hide."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankPool
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel

B, H, S, D = 2, 2, 13, 4
LOWEST = torch.finfo(torch.float32).min
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    ahead = torch.ones(S, S, dtype=torch.bool).triu(1)
    mask = mask.masked_fill(ahead, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.5 + mask).softmax(-1) @ v


ATTENDS = {f.__name__: f for f in (sdpa, causal_sdpa, eager)}


def left_padding(number: float) -> Tensor:
    """Three and no pads in front, ``(B, 1, 1, S)``."""
    mask = torch.zeros(B, 1, 1, S)
    mask[0, ..., :3] = number
    return mask


def by_pair(number: float) -> Tensor:
    """Causal, and one sequence padded in front, ``(B, 1, S, S)``."""
    ahead = torch.ones(S, S, dtype=torch.bool).triu(1)
    mask = torch.zeros(B, 1, S, S).masked_fill(ahead, number)
    mask[0, ..., :3] = number
    return mask


MASKS = {"keys": left_padding, "pairs": by_pair}
NUMBERS = {"min": LOWEST, "-1e9": -1e9}


def run(
    call: Attend, dtype: torch.dtype, given: tuple[Tensor, ...], mask: Tensor
) -> list[Tensor]:
    """Output and gradients by q, k and v; ``given`` ends in the output's gradient."""
    *qkv, grad = given
    q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in qkv)
    out = call(q, k, v, mask.to(dtype))
    grads = torch.autograd.grad(out, (q, k, v), grad.to(dtype))
    return [out.detach(), *grads]


def attend_on_rank(
    group: ProcessGroup, _rank: int, cases: list[tuple[str, ...]]
) -> None:
    for name, kind, size in cases:
        torch.manual_seed(0)
        given = tuple(torch.randn(B, H, S, D) for _ in range(4))
        mask = MASKS[kind](NUMBERS[size])
        attend = ATTENDS[name]

        call, record = compile_ring(attend, group, compiler="aot_eager")
        got = run(call, torch.float32, given, mask)
        # The fused CPU kernel loses the number of keys behind finfo.min in backward.
        with sdpa_kernel(SDPBackend.MATH):
            want = run(attend, torch.float64, given, mask)
            eager32 = run(attend, torch.float32, given, mask)
        assert record.rings, (name, kind, size, record.refused)
        for n, (x, y, z) in enumerate(zip(got, want, eager32, strict=True)):
            error, own = (float((a - y).abs().max()) for a in (x, z))
            assert error <= max(2e-6, 2 * own), (name, kind, size, n, error, own)
        torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_that_a_float_mask_hides(ranks: RankPool, size: int) -> None:
    """Scores of finfo.min are all alike: such a row gives the mean, as in eager."""
    cases = [(a, m, n) for a in ATTENDS for m in MASKS for n in NUMBERS]
    ranks.run(attend_on_rank, cases, world_size=size)
