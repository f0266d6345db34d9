"""Steps on the way that look harmless and are not: refused, or left alone."""

import math
from collections.abc import Callable

import pytest
import torch
from support.attentions import trace
from torch import Tensor

from ringcompile.ir.mask import EmptyRow
from ringcompile.passes.canonicalize import canonicalize
from ringcompile.passes.regions import Region

B, H, S, D = 2, 3, 6, 4
LOWEST = torch.finfo(torch.float32).min
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def hidden() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu(1)


def finish(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def own(x: Tensor) -> Tensor:
    return x - x.amax(-1, keepdim=True)


def masked_through_a_view(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)
    scores.view(B, H, S, S).masked_fill_(hidden(), -math.inf)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1))


def total_through_a_view(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    total = e.sum(-1, keepdim=True)
    total.view(-1).mul_(2)
    return (e / total) @ v


def sink_beside_shifted(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    sinks = torch.arange(float(H)).view(1, H, 1, 1).expand(B, H, S, 1)
    return torch.cat([own(q @ k.mT), sinks], -1).softmax(-1)[..., :-1] @ v


def half_bias(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    q, k, v = q.half(), k.half(), v.half()
    mask = torch.ones(S, S, dtype=torch.bool).triu(0)  # the first query sees none
    scores = (q @ k.mT).masked_fill(mask, torch.finfo(torch.float16).min)
    return finish(scores + torch.arange(S).half() * 60, v)


def narrowed_mask(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    mask = torch.zeros(S, S).masked_fill(hidden() | torch.eye(S).bool(), LOWEST)
    return finish(q @ k.mT + (b + mask).bfloat16(), v)


def bias_written_later(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    weights = (q @ k.mT + b).softmax(-1)
    b.zero_()
    return weights @ v


def sink_written_later(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    sinks = b[0, 0, 0, :H]
    column = sinks.view(1, H, 1, 1).expand(B, H, S, 1)
    weights = torch.cat([q @ k.mT, column], -1).softmax(-1)
    b.zero_()
    return weights[..., :-1] @ v


def product_written_to(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    keep = torch.ones(S, dtype=torch.int64)
    pairs = keep[:, None] * keep
    row = pairs[1]
    pairs[0].zero_()
    scores = (q @ k.mT).masked_fill(~pairs.bool(), -math.inf)
    return finish(scores, v) + row.sum()


CASES: dict[str, Attend] = {
    "bias written later": bias_written_later,
    "sink written later": sink_written_later,
    "product written to": product_written_to,
    "type_as of scores": lambda q, k, v, b: finish(b.double().type_as(q @ k.mT), v),
    "detached scores": lambda q, k, v, b: finish((q @ k.mT).detach(), v),
    "detached weights": lambda q, k, v, b: (q @ k.mT).softmax(-1).detach() @ v,
    "tanh of shifted": lambda q, k, v, b: finish(torch.tanh(own(q @ k.mT)), v),
    "sink beside shifted": sink_beside_shifted,
    "filled around a shift": lambda q, k, v, b: finish(
        own((q @ k.mT).masked_fill(hidden(), LOWEST)).masked_fill(hidden().mT, LOWEST),
        v,
    ),
    "masked through a view": masked_through_a_view,
    "total through a view": total_through_a_view,
    "max of biased": lambda q, k, v, b: finish(
        torch.max(q @ k.mT + b, torch.tensor(LOWEST)), v
    ),
    "half bias": half_bias,
    "rounded division": lambda q, k, v, b: (
        torch.div(
            (e := (q @ k.mT).exp()), e.sum(-1, keepdim=True), rounding_mode="floor"
        )
        @ v
    ),
    "zero cap": lambda q, k, v, b: finish(torch.tanh(q @ k.mT) * 0.0, v),
}
BIASED: dict[str, Attend] = {
    "type_as": lambda q, k, v, b: finish(b.double().type_as(s := q @ k.mT) + s, v),
    "expand_as": lambda q, k, v, b: finish(b.expand_as(s := q @ k.mT) + s, v),
    "view_as": lambda q, k, v, b: finish(
        b.expand(B, H, S, S).contiguous().view_as(s := q @ k.mT) + s, v
    ),
}


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, S, D, generator=generator) for _ in range(3))
    bias = torch.randn(B, 1, S, S, generator=generator)
    bias[:, :, 2] = -math.inf
    return q, k, v, bias


@pytest.mark.parametrize("name", CASES)
def test_no_region_is_made_of_it(name: str) -> None:
    traced = trace(CASES[name], *make_inputs())
    canonicalize(traced.gm)
    assert not any(isinstance(f, Region) for f in traced.find())


@pytest.mark.parametrize("name", BIASED)
def test_what_lends_its_shape_is_no_score(name: str) -> None:
    """The one region's numbers are held against the graph's."""
    q, k, v, bias = make_inputs()
    region = trace(BIASED[name], q, k, v, bias.nan_to_num(neginf=0.0)).region()
    assert len(region.biases) == 1


def test_padding_of_unknown_ints_beside_filled_keys_is_refused() -> None:
    """A padded query sees hidden keys alone, and then all that were filled too."""

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(hidden(), LOWEST)
        return finish(scores + (1.0 - keep[:, None, None]) * LOWEST, v)

    keep = torch.ones(B, S, dtype=torch.int64)
    keep[:, :2] = 0
    refusal = trace(attend, *make_inputs()[:3], keep).refusal()
    assert "finfo.min" in refusal.what


def test_a_mask_is_not_read_through_a_narrower_dtype() -> None:
    """finfo.min of float32 is -inf in bfloat16, and a row of those is NaN."""
    q, k, v, bias = make_inputs()
    region = trace(narrowed_mask, q, k, v, bias.nan_to_num(neginf=0.0)).region()
    assert region.mask.empty_row is EmptyRow.NAN


def test_a_detached_bias_stays_detached() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        mask = torch.zeros(S, S).masked_fill(hidden(), -math.inf)
        return finish(q @ k.mT + (b + mask).detach(), v)

    q, k, v, bias = make_inputs()
    region = trace(attend, q, k, v, bias.nan_to_num(neginf=0.0)).region()
    assert [b.node.name for b in region.biases] == ["detach"]
