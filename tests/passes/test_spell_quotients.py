"""Weights that are divided late, by a sum in other words, or with one more summand."""

import math
from collections.abc import Callable

import pytest
import torch
from support.attentions import Traced, trace
from torch import Tensor

from ringcompile.passes.canonicalize import canonicalize
from ringcompile.passes.regions import Region

B, H, S, D = 2, 3, 6, 4
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, S, D, generator=generator) for _ in range(3))
    return q, k, v


def canonical(attend: Attend) -> Traced:
    traced = trace(attend, *make_qkv())
    want = traced.gm(*make_qkv())
    canonicalize(traced.gm)
    torch.testing.assert_close(traced.gm(*make_qkv()), want, equal_nan=True)
    return traced


def exps(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).exp()


def shifted(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.amax(-1, keepdim=True)).exp()


def causal() -> Tensor:
    return torch.ones(S, S).tril()


def late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = shifted(q, k)
    return (e @ v) / e.sum(-1, keepdim=True)


def late_through_views(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = exps(q, k)
    flat = torch.bmm(e.flatten(0, 1), v.flatten(0, 1))
    return flat.view(B, H, S, D).transpose(1, 2) / e.sum(3).transpose(1, 2)[..., None]


def late_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = exps(k, q)
    return (e.mT @ v) / e.sum(-2)[..., None]


def late_with_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = exps(q, k) * causal()
    return (e @ v) / e.sum(-1, keepdim=True)


FOUND: dict[str, Attend] = {
    "late": late,
    "late, through views": late_through_views,
    "late, keys first": late_keys_first,
    "late, with a mask": late_with_a_mask,
    "late, beside a small number": lambda q, k, v: (
        (e := exps(q, k)) @ v / (e.sum(-1, keepdim=True) + 1e-6)
    ),
    "late, sum of a view": lambda q, k, v: (
        torch.bmm((e := exps(q, k).flatten(0, 1)), v.flatten(0, 1)).view(B, H, S, D)
        / e.view(B, H, S, S).sum(-1, keepdim=True)
    ),
    "sum without its dim": lambda q, k, v: (
        ((e := exps(q, k)) / e.sum(-1)[..., None]) @ v
    ),
    "sum expanded": lambda q, k, v: (
        ((e := exps(q, k)) / e.sum(-1, keepdim=True).expand(B, H, S, S)) @ v
    ),
    "one more": lambda q, k, v: ((e := exps(q, k)) / (e.sum(-1, keepdim=True) + 1)) @ v,
    "one more, then a view": lambda q, k, v: (
        ((e := exps(q, k)) / (1 + e.sum(-1)).unsqueeze(-1)) @ v
    ),
    "exps masked": lambda q, k, v: (
        ((e := shifted(q, k) * causal()) / e.sum(-1, keepdim=True)) @ v
    ),
    "exps filled": lambda q, k, v: (
        ((e := exps(q, k).masked_fill(causal() == 0, 0)) / e.sum(-1, keepdim=True)) @ v
    ),
    "exps chosen": lambda q, k, v: (
        ((e := torch.where(causal() > 0, exps(q, k), 0)) / e.sum(-1, keepdim=True)) @ v
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_quotients_are_attentions(name: str) -> None:
    """The region is held against the graph."""
    region = canonical(FOUND[name]).region()
    more = {"late, beside a small number": math.log(1e-6)} | dict.fromkeys(
        ("one more", "one more, then a view"), 0.0
    )
    assert region.sinks == more.get(name)


def total_written_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = exps(q, k)
    total = e.sum(-1, keepdim=True)
    total[0].mul_(2)
    return (e @ v) / total


def over_another_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = exps(q, k)
    return ((e * causal()) @ v) / e.sum(-1, keepdim=True)


def features_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention of exps: no scores at all."""
    e = q.exp()
    return (e @ (k.mT @ v)) / e.sum(-1, keepdim=True)


OTHERS: dict[str, Attend] = {
    "late, sum over queries": lambda q, k, v: (
        (e := exps(q, k)) @ v / e.sum(-2)[..., None]
    ),
    "late, sum of other exps": lambda q, k, v: (
        exps(q, k) @ v / exps(k, q).sum(-1, keepdim=True)
    ),
    "late, mean": lambda q, k, v: (e := exps(q, k)) @ v / e.mean(-1, keepdim=True),
    "late, detached": lambda q, k, v: (
        (e := exps(q, k)) @ v / e.sum(-1, keepdim=True).detach()
    ),
    "late, rounded": lambda q, k, v: torch.div(
        (e := exps(q, k)) @ v, e.sum(-1, keepdim=True), rounding_mode="floor"
    ),
    "late, turned": lambda q, k, v: (
        (e := exps(q, k)) @ v / e.sum(-1).flip(-1)[..., None]
    ),
    "late, of all queries": lambda q, k, v: (
        (e := exps(q, k)) @ v / e.sum(-1, keepdim=True)[:, :, :1]
    ),
    "late, of some keys": lambda q, k, v: (
        (e := exps(q, k)) @ v / e[..., :4].sum(-1, keepdim=True)
    ),
    "late, of shuffled sums": lambda q, k, v: (
        (e := exps(q, k)) @ v / e.reshape(B, S, H, S).sum(-1).mT[..., None]
    ),
    "late, no exps": lambda q, k, v: (
        (e := (q @ k.mT).square()) @ v / e.sum(-1, keepdim=True)
    ),
    "total written later": total_written_later,
    "over another mask": over_another_mask,
    "features first": features_first,
    "a number beside a shift": lambda q, k, v: (
        ((e := shifted(q, k)) / (e.sum(-1, keepdim=True) + 1e-2)) @ v
    ),
    "a negative number": lambda q, k, v: (
        ((e := exps(q, k)) / (e.sum(-1, keepdim=True) - 0.1)) @ v
    ),
    "a tensor beside the sum": lambda q, k, v: (
        ((e := exps(q, k)) / (e.sum(-1, keepdim=True) + q[..., :1].abs())) @ v
    ),
    "twice the sum": lambda q, k, v: (
        (
            (e := exps(q, k))
            / torch.add(torch.ones(()), e.sum(-1, keepdim=True), alpha=2)
        )
        @ v
    ),
    "the larger of two": lambda q, k, v: (
        ((e := exps(q, k)) / e.sum(-1, keepdim=True).clamp(min=1.5)) @ v
    ),
    "exps doubled": lambda q, k, v: (
        ((e := exps(q, k) * 2) / (1 + e.sum(-1, keepdim=True))) @ v
    ),
    "exps weighted": lambda q, k, v: (
        ((e := exps(q, k) * (causal() + 0.5)) / e.sum(-1, keepdim=True)) @ v
    ),
    "exps filled with one": lambda q, k, v: (
        ((e := exps(q, k).masked_fill(causal() == 0, 1)) / e.sum(-1, keepdim=True)) @ v
    ),
    "exps times exps": lambda q, k, v: (
        ((e := exps(q, k) * exps(k, q)) / e.sum(-1, keepdim=True)) @ v
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_quotients_are_left_alone(name: str) -> None:
    found = canonical(OTHERS[name]).find()
    assert not any(isinstance(f, Region) for f in found)
