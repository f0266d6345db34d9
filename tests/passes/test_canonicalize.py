"""Fewer spellings, the same results."""

from collections.abc import Callable

import pytest
import torch
from support.attentions import Traced, trace
from torch import Tensor

from ringcompile.ir.mask import Mask, causal
from ringcompile.passes.canonicalize import canonicalize
from ringcompile.passes.memory import writes_memory

B, H, S, D = 2, 3, 6, 4
LOWEST = torch.finfo(torch.float32).min


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, S, D, generator=generator) for _ in range(3))
    return q, k, v


def run(traced: Traced) -> Tensor:
    result = traced.gm(*(x.clone() for x in make_inputs()))
    assert isinstance(result, Tensor)
    return result


def canonical(fn: Callable[..., Tensor], *, edits: int) -> Traced:
    """A traced function after the pass, which must not change its result."""
    traced = trace(fn, *make_inputs())
    before = run(traced)
    assert canonicalize(traced.gm) == edits
    assert torch.equal(run(traced), before)
    assert canonicalize(traced.gm) == 0
    return traced


def triangle() -> Tensor:
    return torch.zeros(S, S).fill_(LOWEST).triu_(1)


def scores_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores /= 2
    scores += triangle()
    return torch.matmul(scores.softmax(-1), v)


def fills_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ahead = torch.ones(S, S, dtype=torch.bool).triu(1)
    scores = torch.matmul(q, k.mT).div_(2).masked_fill_(ahead, -torch.inf)
    return torch.matmul(scores.softmax(-1), v)


@pytest.mark.parametrize(
    ("attend", "edits"), [(scores_in_place, 4), (fills_in_place, 2)]
)
def test_attention_in_place_is_found(attend: Callable[..., Tensor], edits: int) -> None:
    traced = canonical(attend, edits=edits)
    assert not any(map(writes_memory, traced.gm.graph.nodes))
    region = traced.region()
    assert region.mask == Mask(causal())
    assert region.scale == 0.5


def seen_through_an_older_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = q * 2
    view = x[0]
    x.add_(1)
    return view + x


def writes_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = q * 2
    x[0].add_(1)
    return x


def writes_an_input(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.add_(1) * q


def keeps_the_dtype_of_the_target(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * 2).half().add_(k)


def draws(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * 0).bernoulli_(1.0)


@pytest.mark.parametrize(
    "fn",
    [
        seen_through_an_older_name,
        writes_an_input,
        keeps_the_dtype_of_the_target,
        draws,
    ],
)
def test_what_others_may_see_stays_in_place(fn: Callable[..., Tensor]) -> None:
    traced = canonical(fn, edits=0)
    assert any(map(writes_memory, traced.gm.graph.nodes))


def test_one_that_others_read_before_becomes_functional() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = q * 2
        y = x.sum()
        return x.add_(1) + y

    canonical(fn, edits=1)


# ---- einsum --------------------------------------------------------------------------


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd, bhkd -> bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def heads_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("attend", [heads_first, heads_inside])
def test_attention_by_einsum_is_found(attend: Callable[..., Tensor]) -> None:
    region = canonical(attend, edits=2).region()
    assert region.mask == Mask()
    assert [o.node.name for o in (region.q, region.k, region.v)] == [
        "q_1",
        "k_1",
        "v_1",
    ]


@pytest.mark.parametrize(
    "equation",
    [
        "bhqd,bhqd->bhq",
        "bhqd,bhkd->q",
        "bhqd,bhkd",
        "...qd,...kd->...q",
        "bhqd,bgkd->bhgqk",
        "bhqd,bhke->bhqk",
    ],
)
def test_other_einsums_stay(equation: str) -> None:
    canonical(lambda q, k, v: torch.einsum(equation, q, k), edits=0)


def test_an_einsum_that_broadcasts_stays() -> None:
    canonical(lambda q, k, v: torch.einsum("bhqd,bhkd->bhqk", q, k[:, :1]), edits=0)


def first_row_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores[:, :, 0] = 0.5
    scores[:, 1:, 1] *= 2
    scores[..., 2:4] = k[..., :1]
    return torch.matmul(scores.softmax(-1), v)


def test_a_write_to_a_view_becomes_a_new_value() -> None:
    assert canonical(writes_a_view, edits=1).gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten.select_scatter.default
    )
    traced = canonical(first_row_written, edits=4)  # *= writes twice
    assert not any(writes_memory(n) for n in traced.gm.graph.nodes)


def test_a_write_that_an_older_view_sees_stays() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.mT)
        row = scores[:, 0]
        scores[:, :, 0] = 0.5
        return torch.matmul(scores.softmax(-1), v) + row.sum()

    traced = canonical(attend, edits=0)
    assert any(writes_memory(n) for n in traced.gm.graph.nodes)
