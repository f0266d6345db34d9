"""Reshards and their transposes against eager on one rank, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.ranks import RankPool
from torch import Tensor
from torch.distributed import ProcessGroup

import ringcompile.lowering  # noqa: F401
from ringcompile import ops
from ringcompile.ir.layout import Layout
from ringcompile.ir.reshard import ReshardSpec, format_spec, parse_spec
from ringcompile.lowering.inductor import inductor_patches
from ringcompile.torch_private import compile_with_inductor

B, D, WORDS = 2, 4, 11
LAYOUTS = ("contiguous", "zigzag", "striped", "hilbert")


@dataclass(frozen=True)
class Case:
    layout: str
    length: int
    loss_inside: bool = True
    compiles: bool = False


def spec_of(group: ProcessGroup, rank: int, layout: str) -> str:
    layout_ = Layout(layout, group.size())
    return format_spec(ReshardSpec(layout_, rank, group.group_name, 60.0, ""))


# ---- a model with every kind of use --------------------------------------------------


def weights() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = [(WORDS, D), (D, D), (D, D), (D, D)]
    return [
        torch.randn(s, generator=random, dtype=torch.double, requires_grad=True)
        for s in sizes
    ]


def tokens(length: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WORDS, (B, length), generator=random)
    labels = torch.randint(0, WORDS, (B, length), generator=random)
    labels[0, :3] = -100
    return ids, labels


def eager(ids: Tensor, labels: Tensor, *weights: Tensor) -> Tensor:
    """Embedding, a linear layer, one over all rows, a gate of the mean, a tied head."""
    table, w1, w2, wg = weights
    h = F.embedding(ids, table) @ w1
    h = h + h.cumsum(1) @ w2
    h = h * torch.sigmoid(h.mean(1) @ wg)[:, None]
    return F.cross_entropy((h @ table.T).flatten(0, 1), labels.flatten())


def on_shards(spec: str, case: Case) -> Callable[..., Tensor]:
    """The same on shards, as the passes write it."""
    S = case.length

    def model(ids: Tensor, labels: Tensor, *weights: Tensor) -> Tensor:
        table, w1, w2, wg = weights
        own_table, own_w1 = ops.SPREAD([table, w1], spec=spec)
        h = F.embedding(ops.SHARD(ids, 1, spec=spec), own_table) @ own_w1
        full = ops.GATHER(h, 1, S, spec=spec)
        h = h + ops.SHARD(full.cumsum(1) @ w2, 1, spec=spec)
        is_real = ops.SHARD(torch.ones(1, S, 1, dtype=torch.bool), 1, spec=spec, fill=0)
        mean = ops.REDUCE((h * is_real).sum(1), spec=spec) / S
        (gate,) = ops.SPREAD([torch.sigmoid(mean @ wg)], spec=spec)
        logits = (h * gate[:, None]) @ own_table.T
        if case.loss_inside:
            flat = ops.SHARD(labels.flatten(), 0, B, 1, spec=spec, fill=-100)
            loss = F.cross_entropy(logits.flatten(0, 1), flat, reduction="sum")
            total: Tensor = ops.REDUCE(loss, spec=spec)
            return total / (labels != -100).sum()
        full = ops.GATHER(logits, -2, S, spec=spec)
        return F.cross_entropy(full.flatten(0, 1), labels.flatten())

    return model


def run_model(
    group: ProcessGroup, rank: int, cases: tuple[Case, ...]
) -> list[list[Tensor | None]]:
    results: list[list[Tensor | None]] = []
    for case in cases:
        model = on_shards(spec_of(group, rank, case.layout), case)
        if case.compiles:
            model = torch.compile(
                model,
                fullgraph=True,
                backend=lambda gm, x: compile_with_inductor(
                    gm, x, inductor_patches({})
                ),
            )
        values = weights()
        loss = model(*tokens(case.length), *values)
        loss.backward()
        results.append([loss.detach(), *(w.grad for w in values)])
    return results


def check(ranks: RankPool, world_size: int, cases: list[Case]) -> None:
    by_rank = ranks.run(run_model, tuple(cases), world_size=world_size)
    for n, case in enumerate(cases):
        values = weights()
        loss = eager(*tokens(case.length), *values)
        loss.backward()
        want = [loss.detach(), *(w.grad for w in values)]
        for results in by_rank:
            for got, expected in zip(results[n], want, strict=True):
                torch.testing.assert_close(got, expected, msg=str(case))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_are_those_of_eager(ranks: RankPool, world_size: int) -> None:
    lengths = (24, 17, 7)
    check(
        ranks,
        world_size,
        [
            Case(layout, length, loss_inside)
            for layout in LAYOUTS
            for length in lengths
            for loss_inside in (True, False)
        ],
    )


@pytest.mark.slow
def test_compiled_gradients_are_those_of_eager(ranks: RankPool) -> None:
    check(ranks, 2, [Case(n, 17, compiles=True) for n in ("zigzag", "hilbert")])


# ---- one op at a time ----------------------------------------------------------------


def cut_and_join(
    group: ProcessGroup, rank: int, layout: str, length: int
) -> tuple[bool, Tensor, Tensor]:
    spec = spec_of(group, rank, layout)
    x = torch.arange(B * length * 3 * D).view(B, length, 3, D)
    plain = ops.SHARD(x, 1, spec=spec)
    flat = ops.SHARD(x.reshape(-1, D), 0, B, 3, spec=spec).view(B, -1, 3, D)
    joined = ops.GATHER(flat.reshape(-1, D), -2, length, B, 3, spec=spec)
    filled = ops.SHARD(x[..., 0, 0], -1, spec=spec, fill=-7)
    return (
        torch.equal(plain, flat) and torch.equal(joined, x.view(-1, D)),
        plain,
        filled,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [12, 7, 2])
def test_rows_are_those_of_the_layout(
    ranks: RankPool, layout: str, length: int
) -> None:
    x = torch.arange(B * length * 3 * D).view(B, length, 3, D)
    for rank, (is_equal, plain, filled) in enumerate(
        ranks.run(cut_and_join, layout, length, world_size=3)
    ):
        assert is_equal
        at = torch.tensor(Layout(layout, 3).positions(rank, length))
        own = x[:, at.clamp(max=length - 1)]
        assert torch.equal(plain, own)
        assert torch.equal(filled, torch.where(at < length, own[..., 0, 0], -7))


def spread_low_precision(group: ProcessGroup, rank: int) -> list[Tensor | None]:
    spec = spec_of(group, rank, "contiguous")
    xs = [torch.ones(3, dtype=torch.bfloat16), torch.ones(2), torch.ones(2)]
    xs[0].requires_grad_()
    xs[2].requires_grad_()
    a, _, c = ops.SPREAD(xs, spec=spec)
    # 256 + 1 is 256 in bfloat16: only a wider sum over ranks gives 260.
    ((a * (256 if rank == 0 else 1)).sum() + ops.SCALE_GRAD(c, 0.5).sum()).backward()
    return [x.grad for x in xs]


def test_partial_gradients_are_summed_in_float32(ranks: RankPool) -> None:
    for a, b, c in ranks.run(spread_low_precision, world_size=4):
        assert a is not None
        assert c is not None
        assert b is None
        assert a.dtype == torch.bfloat16
        assert a.tolist() == [torch.tensor(259.0).bfloat16().item()] * 3
        assert c.tolist() == [2.0, 2.0]


def test_specs_are_read_back() -> None:
    for layout in (Layout("zigzag", 4), Layout("hilbert", 4, 24)):
        spec = ReshardSpec(layout, 3, "a group = x", 600.0, "abc")
        assert parse_spec(format_spec(spec)) == spec
