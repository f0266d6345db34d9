"""Factors of scores, finite numbers in their place, and masks of unknown numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from support.attentions import Traced, trace
from torch import Tensor

from ringcompile.ir.mask import EmptyRow
from ringcompile.passes.canonicalize import canonicalize
from ringcompile.passes.regions import Refusal, Region

B, H, S, D = 2, 3, 6, 4
LOWEST = torch.finfo(torch.float32).min
Change = Callable[[Tensor, Tensor], Tensor]


def hidden() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu(1)


def find(
    change: Change, given: Tensor, end: Change = lambda weights, _: weights
) -> Region | Refusal:
    """What is found where scores are changed, and weights too."""

    def attend(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        scores = change(q @ k.mT, given)
        return end(scores.softmax(-1), given) @ v

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, S, D, generator=generator) for _ in range(3))
    traced: Traced = trace(attend, q, k, v, given)
    canonicalize(traced.gm)
    (found,) = traced.find()
    return found


def region(
    change: Change, given: Tensor, end: Change = lambda weights, _: weights
) -> Region:
    found = find(change, given, end)
    assert isinstance(found, Region), found
    return found


# ---- factors -------------------------------------------------------------------------

FACTORS: dict[str, tuple[Change, tuple[int, ...]]] = {
    "number": (lambda a, x: a * x[0, 0, 0], (1, 1, 1, 1)),
    "head": (lambda a, x: a * x[0, :, :1, None], (1, H, 1, 1)),
    "head, divided": (lambda a, x: a / x[0, :, :1, None], (1, H, 1, 1)),
    "batch": (lambda a, x: a * x[:, :1, :1, None], (B, 1, 1, 1)),
    "query": (lambda a, x: x[..., None] * a, (B, H, S, 1)),
    "query of all": (lambda a, x: a * x[0, 0, :, None], (1, 1, S, 1)),
    "repeated": (lambda a, x: a * x[0, :, :1, None].expand(B, H, S, S), (1, H, 1, 1)),
}


@pytest.mark.parametrize("name", FACTORS)
def test_what_keys_do_not_vary_is_a_factor_of_q(name: str) -> None:
    change, view = FACTORS[name]
    given = torch.linspace(0.5, 1.5, B * H * S).view(B, H, S)
    (factor,) = region(change, given).factors
    assert factor.view == view
    assert factor.divides == ("divided" in name)


def test_factors_may_stand_inside_a_softcap_and_before_masks() -> None:
    def change(a: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(a * x * 0.5) * 2).masked_fill(hidden(), -math.inf)

    found = region(change, torch.tensor(0.7))
    assert found.softcap == 2
    assert len(found.factors) == 1


def written(a: Tensor, x: Tensor) -> Tensor:
    scores = a * x[0, 0, 0]
    x.zero_()
    return scores


NO_FACTORS: dict[str, Change] = {
    "key": lambda a, x: a * x[:, :, None],
    "pair": lambda a, x: a * x[..., None] * x[:, :, None],
    "masked": lambda a, x: a.masked_fill(hidden(), -math.inf) * x[..., None],
    "biased": lambda a, x: (a + x[:, :, None]) * x[..., None],
    "capped": lambda a, x: torch.tanh(a) * x[..., None],
    "wider": lambda a, x: (a * x[..., None].double()).float(),
    "written": written,
    "divided by scores": lambda a, x: x[..., None] / a,
    "power": lambda a, x: a ** x[..., None],
}


@pytest.mark.parametrize("name", NO_FACTORS)
def test_other_factors_are_refused(name: str) -> None:
    given = torch.linspace(0.5, 1.5, B * H * S).view(B, H, S)
    assert isinstance(find(NO_FACTORS[name], given), Refusal)


# ---- numbers in the place of scores --------------------------------------------------


def make_padding() -> Tensor:
    """The first queries, under a causal mask, see no key."""
    keep = torch.ones(B, S, dtype=torch.int64)
    keep[:, :2] = 0
    return keep


@pytest.mark.parametrize("number", [-1e8, -1e9, -1e30])
def test_scores_may_be_filled_by_large_numbers(number: float) -> None:
    def change(a: Tensor, keep: Tensor) -> Tensor:
        return a.masked_fill(hidden() | (keep[:, None, None] == 0), number)

    assert region(change, make_padding()).mask.empty_row is EmptyRow.MEAN_FILLED


MODERATE: dict[str, Change] = {
    "-1e4": lambda a, _: a.masked_fill(hidden(), -1e4),
    "-1e9, scaled": lambda a, _: a.masked_fill(hidden(), -1e9) * 1e-5,
    "-1e9 and a low bias": lambda a, keep: (
        a.masked_fill(hidden(), -1e9) + (1 - keep[:, None, None]) * -1e9
    ),
    "-1e9 and a low bias by a factor": lambda a, keep: torch.add(
        a.masked_fill(hidden(), -1e9), 1.0 - keep[:, None, None], alpha=-1e9
    ),
    "two numbers": lambda a, keep: a.masked_fill(
        keep[:, None, None] == 0, -1e9
    ).masked_fill(hidden(), -2e9),
    "-1e9 and moderate biases, no key for some": lambda a, keep: (
        a.masked_fill(hidden() | (keep[:, None, None] == 0), -1e9) + torch.arange(6) / 7
    ),
}


@pytest.mark.parametrize("name", MODERATE)
def test_numbers_that_may_matter_are_refused(name: str) -> None:
    assert isinstance(find(MODERATE[name], make_padding()), Refusal)


# ---- weights masked again ------------------------------------------------------------


def fill(low: float) -> Change:
    return lambda a, keep: a.masked_fill(hide(keep), low)


def hide(keep: Tensor) -> Tensor:
    return hidden() | (keep[:, None, None] == 0)


def refill(weights: Tensor, keep: Tensor) -> Tensor:
    return weights.masked_fill(hide(keep), 0.0)


def test_weights_masked_again_give_zero_to_a_query_without_keys() -> None:
    found = region(fill(LOWEST), make_padding(), refill)
    assert found.mask.empty_row is EmptyRow.ZERO


def test_weights_masked_by_where() -> None:
    found = region(
        fill(LOWEST), make_padding(), lambda w, keep: torch.where(hide(keep), 0.0, w)
    )
    assert found.mask.empty_row is EmptyRow.ZERO


REFILLED: dict[str, tuple[Change, Change]] = {
    "gradients would be NaN": (fill(-math.inf), refill),
    "more keys": (
        lambda a, _: a.masked_fill(hidden(), LOWEST),
        lambda w, keep: w.masked_fill(hide(keep), 0.0),
    ),
    "other keys": (
        lambda a, _: a.masked_fill(hidden(), LOWEST),
        lambda w, _: w.masked_fill(hidden().mT, 0.0),
    ),
    "fewer keys, no key for some": (
        fill(LOWEST),
        lambda w, _: w.masked_fill(hidden(), 0.0),
    ),
    "another number": (fill(LOWEST), lambda w, keep: w.masked_fill(hide(keep), 0.1)),
    "by a factor": (fill(LOWEST), lambda w, keep: w * keep[:, None, None]),
    "by weights": (fill(LOWEST), lambda w, _: torch.where(w > 0.1, w, 0.0)),
}


@pytest.mark.parametrize("name", REFILLED)
def test_other_weights_masked_again_are_refused(name: str) -> None:
    change, end = REFILLED[name]
    assert isinstance(find(change, make_padding(), end), Refusal)


# ---- masks of unknown numbers --------------------------------------------------------


def invert(keep: Tensor) -> Tensor:
    """As libraries expand a mask of the batch."""
    mask = 1.0 - keep[:, None, None].expand(B, 1, S, S).to(torch.float32)
    return mask.masked_fill(mask.to(torch.bool), LOWEST)


TESTED: dict[str, tuple[Change, str]] = {
    "inverted": (lambda a, m: a + invert(m), "c0[b, k] == 1"),
    "one minus": (
        lambda a, m: a.masked_fill((1.0 - m.float())[:, None, None].bool(), LOWEST),
        "c0[b, k] == 1",
    ),
    "minus one": (
        lambda a, m: a.masked_fill((m.half() - 1)[:, None, None] != 0, LOWEST),
        "c0[b, k] == 1",
    ),
    "not zero": (
        lambda a, m: a.masked_fill(m.float()[:, None, None] == 0, LOWEST),
        "c0[b, k] != 0",
    ),
}


@pytest.mark.parametrize("name", TESTED)
def test_unknown_integers_cast_to_float_are_tested(name: str) -> None:
    """1 keeps a key where ``1 - mask`` is added: no other number does."""
    change, want = TESTED[name]
    keep = make_padding()
    keep[:, 3] = 2**24 + 1
    assert want in str(region(change, keep).mask)


def test_floats_that_are_passed_in_are_tested_at_run_time() -> None:
    def change(a: Tensor, ones: Tensor) -> Tensor:
        return a.masked_fill(ones[:S, :S] == 0, -math.inf)

    found = region(change, torch.ones(9, 9).tril())
    assert [n.meta["val"].dtype for n in found.captures] == [torch.bool]


UNKNOWN: dict[str, Change] = {
    "own scores": lambda a, x: a.masked_fill(a < 0, -math.inf),
    "floats inverted": lambda a, x: a.masked_fill((1.0 - x).bool(), -math.inf),
    "floats rounded": lambda a, x: a.masked_fill(x.half() == 0, -math.inf),
    "floats of two": lambda a, x: a.masked_fill(x == x.mT, -math.inf),
    "floats computed": lambda a, x: a.masked_fill(x.cumsum(-1) > 3, -math.inf),
    "floats of a difference": lambda a, x: a.masked_fill(x - x.mT != 0, -math.inf),
    "inverted, filled by another": lambda a, x: (
        a + (m := 1.0 - x).masked_fill((x + 1).bool(), -math.inf).minimum(m)
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_masks_of_other_floats_are_refused(name: str) -> None:
    found = find(UNKNOWN[name], torch.ones(S, S).tril())
    assert isinstance(found, Refusal) or found.biases


def test_numbers_near_each_other_after_a_cast_are_not_told_apart() -> None:
    """2^24 + 1 as a float is 2^24: equal floats are no equal integers."""

    def change(a: Tensor, m: Tensor) -> Tensor:
        floats = m.float()
        same = floats[:, None, :, None] == floats[:, None, None]
        return a.masked_fill(~same, -math.inf)

    assert isinstance(find(change, make_padding()), Refusal)


# ---- assignments ---------------------------------------------------------------------


def test_scores_assigned_by_a_mask() -> None:
    def change(a: Tensor, _: Tensor) -> Tensor:
        a[..., hidden()] = -math.inf
        return a

    assert str(region(change, make_padding()).mask) == "k <= q"


def test_scores_of_whole_rows_assigned_by_a_mask() -> None:
    """A mask of batch and heads stands before the other dims."""

    def change(a: Tensor, keep: Tensor) -> Tensor:
        a[keep[:, :H] == 0] = LOWEST
        return a

    assert "b, h" in str(region(change, make_padding()).mask)


def test_scores_assigned_a_tensor_are_refused() -> None:
    def change(a: Tensor, _: Tensor) -> Tensor:
        a[..., hidden()] = torch.arange(15.0)
        return a

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, S, D, generator=generator)
    traced = trace(lambda q: change(q @ q.mT, q).softmax(-1) @ q, q)
    canonicalize(traced.gm)
    assert not any(isinstance(f, Region) for f in traced.find())
