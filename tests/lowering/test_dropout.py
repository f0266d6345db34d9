"""Dropout of weights: its law, and that ranks, layouts and tiles do not change it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankError, RankPool
from support.sampling import slow
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from ringcompile.lowering.tiles.dropout import find_kept
from ringcompile.patterns import Adaptive, LongNet, Pattern

B, H, G, S, D = 2, 4, 2, 37, 8
RATE = 0.25


def pairs(*sizes: int) -> tuple[Tensor, ...]:
    """Indices of so many batches, heads, queries and keys."""
    return tuple(
        torch.arange(n).view([-1 if d == axis else 1 for d in range(4)])
        for axis, n in enumerate(sizes)
    )


def kept(seed: int, at: tuple[Tensor, ...], rate: float) -> Tensor:
    return find_kept(torch.tensor([seed]), at, rate)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_that_is_kept_is_that_asked_for(rate: float) -> None:
    found = kept(11, pairs(3, 8, 128, 128), rate).double()
    means = [found.mean(), *found.mean((2, 3)).flatten(), *found.mean((0, 1, 2))]
    counts = [found.numel(), *[128 * 128] * 24, *[3 * 8 * 128] * 128]
    for mean, count in zip(means, counts, strict=True):
        assert abs(mean - (1 - rate)) <= 5 * (rate * (1 - rate) / count) ** 0.5


def test_neighbours_and_seeds_are_independent() -> None:
    a = kept(11, pairs(2, 4, 128, 128), 0.5).double() - 0.5
    for other in (
        kept(12, pairs(2, 4, 128, 128), 0.5).double() - 0.5,
        *(a.roll(1, dims=d) for d in range(4)),
    ):
        assert abs((a * other).mean()) <= 5 * 0.25 / a.numel() ** 0.5


def test_what_is_kept_hangs_on_the_pair_alone() -> None:
    b, h, q, k = pairs(2, 4, 64, 64)
    whole = kept(5, (b, h, q, k), 0.3)
    part = kept(5, (b, h, q[:, :, 10:50], k[..., 7:9]), 0.3)
    assert torch.equal(part, whole[:, :, 10:50, 7:9])
    assert kept(5, (b, h, q, k), 0.0).all()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        *(q, k, v), is_causal=True, dropout_p=RATE, enable_gqa=True
    )


def spell_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * D**-0.5).masked_fill(hidden, -torch.inf)
    return F.dropout(scores.softmax(-1), RATE) @ v


def attend_checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = checkpoint(attend, q, k, v, use_reentrant=False)
    return out


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": attend,
    "spelled out": spell_out,
    "checkpointed": attend_checkpointed,
}
PATTERNS: dict[str, Pattern] = {
    "longnet": LongNet((16, 37), (1, 2)),
    "detached": LongNet((16, 37), (1, 2), weights="detached"),
    "adaptive": Adaptive(2, block=8),
}


def make_inputs() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = (H, G, G, H)
    return [
        torch.randn(B, n, S, D, generator=random, dtype=torch.double) for n in sizes
    ]


def run_dropout(
    group: ProcessGroup,
    rank: int,
    spelling: str,
    pattern: str,
    layout: str,
    compiler: str,
) -> list[Tensor]:
    """out, dq, dk, dv, and the weights after dropout as the ring applied them."""
    del rank
    *inputs, grad = make_inputs()
    q, k, v = (x.requires_grad_() for x in inputs)
    call, record = compile_ring(
        SPELLINGS[spelling],
        group,
        compiler=compiler,
        options={
            "attention": PATTERNS.get(pattern, "exact"),
            "layout": layout,
            "unsupported": "error",
        },
    )
    torch.manual_seed(7)
    out = call(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    # With the rows of the unit matrix as values, the output is the weights.
    unit = torch.eye(S, dtype=torch.double).expand(B, G, S, S)
    torch.manual_seed(7)
    weights = call(q.detach(), k.detach(), unit) if pattern == "exact" else unit
    assert len(record.rings) == record.num_graphs
    return [out.detach(), *grads, weights]


CELLS = [
    (2, "sdpa", "zigzag", "eager"),
    (3, "spelled out", "striped", "eager"),
    slow(4, "sdpa", "contiguous", "aot_eager"),
    (2, "sdpa", "hilbert", "eager"),
    (2, "checkpointed", "contiguous", "aot_eager"),
]


@pytest.mark.parametrize(("cp_size", "spelling", "layout", "compiler"), CELLS)
def test_weights_are_dropped_and_gradients_follow(
    ranks: RankPool, cp_size: int, spelling: str, layout: str, compiler: str
) -> None:
    by_rank = ranks.run(
        *(run_dropout, spelling, "exact", layout, compiler), world_size=cp_size
    )
    *inputs, grad = make_inputs()
    q, k, v = (x.requires_grad_() for x in inputs)
    full_k, full_v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    plain = (q @ full_k.mT * D**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    for *got, weights in by_rank:
        is_kept = weights != 0
        shown = torch.where(is_kept, plain.detach() / (1 - RATE), 0.0)
        assert (weights - shown).abs().max() <= 1e-12  # kept ones are scaled up
        share = is_kept[:, :, ~hidden].double().mean()
        assert abs(share - (1 - RATE)) <= 0.02
        out = plain * is_kept / (1 - RATE) @ full_v
        want = [out, *torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)]
        for ours, theirs in zip(got, want, strict=True):
            assert (ours - theirs).abs().max() <= 1e-12


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_drops_alike_on_any_ranks(ranks: RankPool, pattern: str) -> None:
    one, *_ = ranks.run(
        *(run_dropout, "sdpa", pattern, "contiguous", "eager"), world_size=1
    )
    for cp_size, layout in ((2, "zigzag"), (3, "contiguous")):
        for got in ranks.run(
            *(run_dropout, "sdpa", pattern, layout, "eager"), world_size=cp_size
        ):
            for ours, theirs in zip(got, one, strict=True):
                assert (ours - theirs).abs().max() <= 1e-12


def drop_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=1.0, enable_gqa=True)


def run_all_dropped(group: ProcessGroup, rank: int) -> None:
    del rank
    call, _ = compile_ring(
        drop_all, group, compiler="eager", options={"unsupported": "error"}
    )
    call(*make_inputs()[:3])


def test_to_drop_all_is_refused(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"dropout p=1\.0 of its weights"):
        ranks.run(run_all_dropped)
