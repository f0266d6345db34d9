"""Whose heads ranks deal out, and why others' stay."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import flex_attention

from ringcompile import patterns as p
from ringcompile.config import RingOptions
from ringcompile.mesh import Ranks
from ringcompile.passes.pipeline import Rewritten, run_passes

B, H, G, S, D = 1, 4, 2, 32, 8


def plan(
    attend: Callable[..., Tensor],
    *inputs: Tensor,
    ranks: int = 4,
    size: int | None = 2,
    device: str = "cpu",
    **options: object,
) -> tuple[int, str]:
    """How many ranks deal out the heads of an attention, and its reason."""
    made: list[Rewritten] = []

    def note(gm: GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        made.append(
            run_passes(
                gm,
                example_inputs,
                options=RingOptions.from_user(options),
                ranks=Ranks(1, ranks, "test", device, size),
                sources="",
            )
        )
        return gm.forward

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(attend, backend=note)(*inputs)
    ((attention,),) = (m.attentions for m in made)
    ulysses = attention.plan.schedule.ulysses
    assert (attention.plan.rank, attention.plan.member) == divmod(1, ulysses.size)
    return ulysses.size, attention.reason


def qkv(heads: int = H, kv_heads: int = G, length: int = S) -> list[Tensor]:
    return [torch.randn(B, n, length, D) for n in (heads, kv_heads, kv_heads)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As eager models spell it: a row without a key would take the mean."""
    scores = q @ k.repeat_interleave(H // G, 1).mT
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v.repeat_interleave(H // G, 1)


@pytest.mark.parametrize(
    ("attend", "length", "ranks", "size"),
    [
        (causal, S, 4, 2),
        (causal, S, 2, 2),
        (causal, 36, 6, 2),
        (filled, S, 4, 2),  # each row has itself for a key
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_heads_alike_are_dealt_out(
    attend: Callable[..., Tensor], length: int, ranks: int, size: int, layout: str
) -> None:
    inputs = qkv(length=length)
    dealt, reason = plan(attend, *inputs, ranks=ranks, size=size, layout=layout)
    assert dealt == size
    assert "a ring over all ranks" not in reason


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.repeat_interleave(H // G, 1).mT
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v.repeat_interleave(H // G, 1)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


def by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def score(s: Tensor, _b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i - j <= 4 * (h + 1), s, -torch.inf)

    out: Any = flex_attention(q, k, v, score_mod=score, enable_gqa=True)
    return out  # type: ignore[no-any-return]


def crossing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


STRIPED = "shards of neighbours are no shard of the layout striped"
TABLE = torch.arange(H * 64).view(H, 8, 8) * 3 % 7 < 4
REFUSED: dict[str, tuple[Callable[..., Tensor], list[Tensor], dict[str, Any], str]] = {
    "heads": (causal, qkv(6, 3), {}, "6 query and 3 KV heads don't divide by 2"),
    "striped": (causal, qkv(), {"layout": "striped"}, STRIPED),
    "pads": (causal, qkv(length=30), {}, "the sequence does not fill its shards"),
    "dilated": (
        *(causal, qkv(), {"attention": p.LongNet((8, 16), (1, 2))}),
        "rows or blocks are selected by head",
    ),
    "table": (
        *(causal, qkv(), {"attention": p.Custom(TABLE, 4)}),
        "heads have masks of their own",
    ),
    "mask by head": (by_head, qkv(), {}, "heads have masks of their own"),
    "dropout": (dropped, qkv(), {}, "sinks, biases and dropout are heads' own"),
    "bias": (
        *(biased, [*qkv(), torch.randn(1, H, 1, S)], {}),
        "sinks, biases and dropout are heads' own",
    ),
    "mean": (
        *(padded, [*qkv(), torch.ones(B, S).bool()], {}),
        "a row without a key takes the mean of all values",
    ),
    "cross": (
        *(crossing, [qkv()[0], *qkv(length=48)[1:]], {}),
        "its keys are another sequence",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_a_ring_over_all_ranks(name: str) -> None:
    attend, inputs, options, because = REFUSED[name]
    dealt, reason = plan(attend, *inputs, **options)
    assert dealt == 1
    assert reason.endswith(f"; a ring over all ranks: {because}")


def test_the_cost_model_deals_out_heads_where_that_is_surely_cheaper() -> None:
    """Short sequences over many GPUs: a ring has a hop for each of them."""
    inputs = qkv(8, 8, 1024)
    size, reason = plan(causal, *inputs, ranks=8, size=None, device="cuda")
    assert size > 1
    assert "by the model" in reason
    assert "(a ring over all " in reason
    for few in (
        plan(causal, *inputs, ranks=8, size=None),  # what it costs on CPU is not known
        plan(causal, *inputs, ranks=8, size=1, device="cuda"),
        plan(causal, *qkv(7, 7, 1024), ranks=8, size=None, device="cuda"),
        plan(causal, *qkv(8, 8, 1021), ranks=8, size=None, device="cuda"),
    ):
        assert few[0] == 1
        assert "by the model (a ring" not in few[1]
