"""Graphs that a careless rule gets wrong without a word; each equals eager."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankError, RankPool
from torch import Tensor
from torch.distributed import ProcessGroup

B, S, E = 3, 12, 8


def _attend(x: Tensor, mask: Tensor | None = None) -> Tensor:
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    keep = None if mask is None else mask[:, None, None]
    out = F.scaled_dot_product_attention(q, q.sin(), q, attn_mask=keep)
    return out.transpose(1, 2).flatten(2)


def mask_also_pools(x: Tensor, p: Tensor, keep: Tensor) -> Tensor:
    return (_attend(x, keep) * keep.unsqueeze(-1).to(x.dtype)).sum(1)


def batch_and_sequence_flattened_both_ways(
    x: Tensor, p: Tensor, keep: Tensor
) -> Tensor:
    y = _attend(x)
    return y.reshape(B * S, E) + y.transpose(0, 1).reshape(S * B, E)


def bitcast(x: Tensor, p: Tensor, keep: Tensor) -> Tensor:
    return _attend(x).detach().view(torch.int32).float() * 1e-9 + x.mean()


def exact_count(x: Tensor, p: Tensor, keep: Tensor) -> Tensor:
    positive = (_attend(x) > -1e9).long() * (2**24 + 1)
    return positive.sum() + x.sum() * 0


def complex_weight(x: Tensor, p: Tensor, keep: Tensor) -> Tensor:
    spin = torch.view_as_complex(p.view(4, 2)) * 1.0
    return _attend(x) * torch.view_as_real(spin).flatten()


def uneven_split(x: Tensor, p: Tensor, keep: Tensor) -> Tensor:
    a, b = _attend(x).transpose(1, 2).split([2, 6], 1)
    total: Tensor = b.reshape(B, 3 * S, 2).sin().sum(-1) + a.sum()
    return total


def unit_shard_squeezed(x: Tensor, p: Tensor, keep: Tensor) -> Tensor:
    return _attend(x[:, :2])[:, :, None].squeeze(2).squeeze(1) * 2


def all_dims_reversed(x: Tensor, p: Tensor, keep: Tensor) -> Tensor:
    turned: Tensor = torch.ops.aten.numpy_T(_attend(x))
    return turned * p[:, None, None]


def one_attention_upon_the_other(x: Tensor, p: Tensor, keep: Tensor) -> Tensor:
    """Nothing lies between what one gives and what the next one reads."""
    k = x.unflatten(-1, (2, 4)).transpose(1, 2)
    out = k * p[0]
    for _ in range(3):
        out = F.scaled_dot_product_attention(out, k.cos(), k)
    return F.scaled_dot_product_attention(out, out, out).transpose(1, 2).flatten(2)


EXACT = [
    one_attention_upon_the_other,
    mask_also_pools,
    batch_and_sequence_flattened_both_ways,
    bitcast,
    exact_count,
    complex_weight,
    uneven_split,
    unit_shard_squeezed,
    all_dims_reversed,
]


def written_on_a_shard(x: Tensor, p: Tensor, keep: Tensor) -> Tensor:
    y = _attend(x)
    z = y[:, :, 0]
    z.mul_(2)
    return y + z.unsqueeze(-1)


def run_odd(group: ProcessGroup, rank: int, name: str) -> None:
    fn: Callable[..., Tensor] = globals()[name]
    call, record = compile_ring(fn, group, compiler="eager")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, S, E, generator=generator).requires_grad_()
    p = torch.randn(E, generator=generator).requires_grad_()
    keep = torch.arange(S) < torch.tensor([[S], [5], [7]])
    got, want = call(x, p, keep), fn(x, p, keep)
    assert len(record.rings) == (4 if fn is one_attention_upon_the_other else 1)
    torch.testing.assert_close(got, want)
    weight = torch.linspace(1, 2, want.numel()).reshape(want.shape)
    ours, theirs = (
        torch.autograd.grad((y * weight).sum(), (x, p), materialize_grads=True)
        for y in (got, want)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("fn", EXACT, ids=lambda fn: fn.__name__)
def test_an_odd_graph_is_right(ranks: RankPool, fn: Callable[..., Tensor]) -> None:
    ranks.run(run_odd, fn.__name__)


def test_a_write_in_place_on_a_shard_is_refused(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="writes in place"):
        ranks.run(run_odd, "written_on_a_shard")
