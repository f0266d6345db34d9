"""Products in every spelling become ``matmul``; what only looks like one stays."""

from collections.abc import Callable

import pytest
import torch
from support.attentions import Traced, trace
from torch import Tensor

from ringcompile.passes.canonicalize import canonicalize

B, H, G, S, D = 2, 6, 3, 5, 4
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_qkv(kv_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, S, D), (B, kv_heads, S, D), (B, kv_heads, S, D))
    q, k, v = (torch.randn(s, generator=generator) for s in shapes)
    return q, k, v


def canonical(attend: Attend, *inputs: Tensor) -> Traced:
    """The graph in fewer spellings, held against what it was."""
    traced = trace(attend, *inputs)
    want = traced.gm(*inputs)
    canonicalize(traced.gm)
    torch.testing.assert_close(traced.gm(*inputs), want)
    return traced


def targets(traced: Traced) -> set[str]:
    return {str(n.target) for n in traced.gm.graph.nodes if n.op == "call_function"}


def by_einsum(scores: str, result: str) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum(result, torch.einsum(scores, q, k).softmax(-1), v)

    return attend


def einsum_of_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attend = by_einsum("bgusd,bgtd->bgust", "bgust,bgtd->bgusd")
    return attend(q.unflatten(1, (G, H // G)), k, v)


def einsum_of_groups_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (G, H // G)).permute(0, 3, 1, 2, 4)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    attend = by_einsum("bsgud,btgd->bgust", "bgust,btgd->bsgud")
    return attend(q, k, v)


def einsum_of_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_einsum("bhqd,bkd->bhqk", "bhqk,bkd->bhqd")(q, k[:, 0], v[:, 0])


def sums_of_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (k[:, :, :, None] * q[:, :, None]).sum(4)
    weights = scores.softmax(2)
    return (weights[..., None] * v[:, :, :, None]).sum(2)


def sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1)
    return (v[:, :, None] * weights[..., None]).sum(dim=(3,))


PRODUCTS: dict[str, tuple[Attend, int]] = {
    "ellipsis": (by_einsum("...qd,...kd->...qk", "...qk,...kd->...qd"), H),
    "ellipsis and a letter": (
        by_einsum("b...qd,b...kd->b...qk", "...qk,...kd->...qd"),
        H,
    ),
    "one head by ellipsis": (by_einsum("...qd,...kd->...qk", "...qk,...kd->...qd"), 1),
    "groups": (einsum_of_groups, G),
    "groups, tokens first": (einsum_of_groups_tokens_first, G),
    "one head": (einsum_of_one_head, 1),
    "sums": (sums, H),
    "sums of one head": (sums, 1),
    "sums, keys first": (sums_of_keys_first, H),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_attention_are_found(name: str) -> None:
    attend, kv_heads = PRODUCTS[name]
    region = canonical(attend, *make_qkv(kv_heads)).region()
    assert (region.q.shape[1], region.k.shape[1]) == (H, kv_heads)


def test_features_in_two_dims_are_laid_end_to_end() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bqxd,bkxd->bqk", q, k).softmax(-1)
        return torch.einsum("bqk,bkxd->bqxd", weights, v)

    q, k, v = (t.transpose(1, 2).contiguous() for t in make_qkv())
    region = canonical(attend, q, k, v).region()
    assert region.q.shape == (B, 1, S, H * D)


# ---- what stays ----------------------------------------------------------------------


def attend_by(scores: Callable[[Tensor, Tensor], Tensor]) -> Attend:
    return lambda q, k, v: scores(q, k).softmax(-1) @ v


def doubled(x: Tensor) -> Tensor:
    x.mul_(2)
    return x


def written_between(q: Tensor, k: Tensor) -> Tensor:
    products = q[:, :, :, None] * k[:, :, None]
    products[0].zero_()
    return products.sum(-1) + products.amax(-1)


OTHERS: dict[str, Attend] = {
    "sum in another dtype": attend_by(
        lambda q, k: (
            (q[:, :, :, None] * k[:, :, None]).sum(-1, dtype=torch.float64).float()
        )
    ),
    "mean": attend_by(lambda q, k: (q[:, :, :, None] * k[:, :, None]).mean(-1)),
    "sum of sums": attend_by(lambda q, k: (q[:, :, :, None] + k[:, :, None]).sum(-1)),
    "written between": attend_by(written_between),
    "a distance": attend_by(
        lambda q, k: -((q[:, :, :, None] - k[:, :, None]) ** 2).sum(-1)
    ),
    "a part of the features": attend_by(
        lambda q, k: (q[:, :, :, None] * k[:, :, None])[..., :2].sum(-1)
    ),
    "k summed alone": attend_by(lambda q, k: torch.einsum("bhqd,bhke->bhqk", q, k)),
    "batch summed": attend_by(
        lambda q, k: torch.einsum("bhqd,bhkd->hqk", q, k).expand(B, H, S, S)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_are_no_products(name: str) -> None:
    traced = canonical(OTHERS[name], *make_qkv())
    assert not any(type(f).__name__ == "Region" for f in traced.find())


def test_sums_without_a_softmax_stay() -> None:
    """They are no attention, and another op would round them otherwise."""

    def multiply(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q[:, :, :, None] * k[:, :, None]).sum(-1) @ v

    assert "aten.sum.dim_IntList" in targets(canonical(multiply, *make_qkv()))


def test_sums_under_autocast_stay() -> None:
    """Autocast would run a product in lower precision than the sum."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1) @ v

    traced = trace(attend, *make_qkv())
    canonicalize(traced.gm)
    assert "aten.sum.dim_IntList" in targets(traced)


def test_operands_are_read_where_they_were_multiplied() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q + 1
        products = q[:, :, :, None] * k[:, :, None]
        q.zero_()
        return products.sum(-1).softmax(-1) @ v + q

    canonical(attend, *make_qkv())
