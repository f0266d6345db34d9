"""Traps of weights, of masks and biases made of values, and of softmax."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.traps import (
    SCALE,
    B,
    H,
    S,
    Seen,
    Setting,
    attend,
    merge,
    run_step,
    split,
)

# ---- weights, biases, masks made of values -------------------------------------------


def unread_mask(s: Setting) -> Seen:
    def fn(x: Tensor, mask: Tensor) -> Tensor:
        return attend(x, mask.detach().sin())

    return s.step(fn, s.tokens(), s.tokens(S, S, seed=2))


def weights_returned(s: Setting) -> Seen:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        q = split(x)
        weights = (q @ q.sin().mT * SCALE).softmax(-1)
        return merge(weights @ q), weights

    return s.step(fn, s.tokens())


def weights_kept_elsewhere(s: Setting) -> Seen:
    kept: list[Tensor] = []

    def fn(x: Tensor) -> Tensor:
        q = split(x)
        weights = (q @ q.sin().mT * SCALE).softmax(-1)
        kept.append(weights)
        return merge(weights @ q)

    return s.step(fn, s.tokens()) | {"kept": kept[-1]}


def bias_with_gradient(s: Setting) -> Seen:
    return s.step(attend, s.tokens(), s.tokens(S, S, seed=2))


def bias_of_heads_with_gradient(s: Setting) -> Seen:
    return s.step(attend, s.tokens(), s.tokens(1, H, S, S, seed=2))


def bias_from_tokens(s: Setting) -> Seen:
    """ALiBi whose slope is made of the tokens."""

    def fn(x: Tensor) -> Tensor:
        slope = x.mean((1, 2))[:, None, None, None]
        position = torch.arange(S)
        return attend(x, slope * (position[:, None] - position))

    return s.step(fn, s.tokens())


def mask_of_top_scores(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        scores = q @ q.sin().mT * SCALE
        least = scores.topk(3, dim=-1).values[..., -1:]
        return merge(scores.masked_fill(scores < least, -math.inf).softmax(-1) @ q)

    return s.step(fn, s.tokens())


def mask_of_score_sign(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        scores = q @ q.sin().mT * SCALE
        return merge(scores.masked_fill(scores <= 0, -1e9).softmax(-1) @ q)

    return s.step(fn, s.tokens())


def mask_of_key_norms(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        kept = split(x).norm(dim=-1) > 1.0
        return attend(x, kept[:, :, None, :] | torch.eye(S, dtype=torch.bool))

    return s.step(fn, s.tokens())


def mask_of_zero_tokens(s: Setting) -> Seen:
    """Padding found by what the tokens are."""
    x = s.tokens()
    x[1, 8:] = 0
    return s.step(
        lambda x: attend(x, (x != 0).any(-1)[:, None, None, :].expand(B, 1, S, S)), x
    )


def mask_of_queries_only(s: Setting) -> Seen:
    kept = torch.arange(S)[:, None] != 3
    return s.step(lambda x: attend(x, kept.expand(S, S)), s.tokens())


def mask_of_one_key(s: Setting) -> Seen:
    """A last dim of 1 is broadcast over all keys."""
    kept = torch.arange(S)[:, None] != 3
    return s.step(lambda x: attend(x, kept), s.tokens())


def mask_of_another_length(s: Setting) -> Seen:
    kept = torch.ones(S, S - 1, dtype=torch.bool)
    return s.step(lambda x: attend(x, kept), s.tokens())


def mask_for_two_heads_and_batch(s: Setting) -> Seen:
    """(2, S, S) is broadcast over the batch, for H = B = 2: it is by head."""
    kept = torch.rand(2, S, S, generator=torch.Generator().manual_seed(3)) > 0.4
    kept = kept | torch.eye(S, dtype=torch.bool)
    return s.step(lambda x: attend(x, kept), s.tokens())


def mask_buffer_changes(s: Setting) -> Seen:
    """The second call's mask is another, without a recompilation."""

    class Model(nn.Module):
        kept: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.ones(S, S, dtype=torch.bool).tril())

        def forward(self, x: Tensor) -> Tensor:
            return attend(x, self.kept)

    model = Model()
    call = s.compile(model)
    first = run_step(call, s.tokens())
    model.kept.copy_(torch.ones(S, S, dtype=torch.bool).triu())
    second = run_step(call, s.tokens())
    return first | {f"second {n}": x for n, x in second.items()}


def float_mask_buffer_changes(s: Setting) -> Seen:
    class Model(nn.Module):
        bias: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.full((S, S), -math.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            q = split(x)
            scores = q @ q.sin().mT * SCALE + self.bias[: x.shape[1], : x.shape[1]]
            return merge(scores.softmax(-1).to(x.dtype) @ q)

    model = Model()
    call = s.compile(model)
    first = run_step(call, s.tokens())
    model.bias.copy_(torch.arange(S * S).view(S, S) * 0.01)
    second = run_step(call, s.tokens())
    return first | {f"second {n}": x for n, x in second.items()}


def padding_comes_later(s: Setting) -> Seen:
    """Nothing is padded at the first call."""
    call = s.compile(lambda x, kept: attend(x, kept[:, None, None]))
    first = run_step(call, s.tokens(), torch.ones(B, S, dtype=torch.bool))
    second = run_step(call, s.tokens(), torch.arange(S) < torch.tensor([[S], [5]]))
    return first | {f"second {n}": x for n, x in second.items()}


def scale_buffer_changes(s: Setting) -> Seen:
    class Model(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            q = split(x)
            return merge((q @ q.sin().mT * self.scale).softmax(-1) @ q)

    model = Model()
    call = s.compile(model)
    first = run_step(call, s.tokens())
    model.scale.fill_(2.0)
    second = run_step(call, s.tokens())
    return first | {f"second {n}": x for n, x in second.items()}


def learned_scale(s: Setting) -> Seen:
    def fn(x: Tensor, scale: Tensor) -> Tensor:
        q = split(x)
        return merge((q @ q.sin().mT * scale).softmax(-1) @ q)

    return s.step(fn, s.tokens(), s.tokens(1, seed=5))


def temperature_of_tokens(s: Setting) -> Seen:
    """Each query, and each key, has a factor of its own."""

    def fn(x: Tensor) -> Tensor:
        q = split(x)
        by_query = x.mean(-1)[:, None, :, None]
        by_key = x.amax(-1)[:, None, None, :]
        return merge((q @ q.sin().mT * by_query * by_key).softmax(-1) @ q)

    return s.step(fn, s.tokens())


def left_padding_of_lowest_numbers(s: Setting) -> Seen:
    """Queries that see no key: the lowest number makes that the mean."""

    def fn(x: Tensor, kept: Tensor) -> Tensor:
        q = split(x)
        low = torch.finfo(x.dtype).min
        ahead = torch.ones(S, S, dtype=torch.bool).triu(1)
        scores = q @ q.sin().mT * SCALE
        scores = scores.masked_fill(ahead | ~kept[:, None, None], low)
        return merge(scores.softmax(-1) @ q)

    return s.step(fn, s.tokens(), torch.arange(S) >= torch.tensor([[0], [4]]))


def left_padding_of_infinity(s: Setting) -> Seen:
    """Queries that see no key: NaN."""

    def fn(x: Tensor, kept: Tensor) -> Tensor:
        return attend(
            x,
            torch.where(kept[:, None, None], 0.0, -math.inf).to(x.dtype)
            + torch.full((S, S), -math.inf, dtype=x.dtype).triu(1),
        )

    return s.step(fn, s.tokens(), torch.arange(S) >= torch.tensor([[0], [4]]))


def nothing_is_kept(s: Setting) -> Seen:
    return s.step(
        lambda x, kept: attend(x, kept[:, None, None]),
        s.tokens(),
        torch.zeros(B, S, dtype=torch.bool),
    )


# ---- softmax and dropout -------------------------------------------------------------


def softmax_over_queries(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        return merge((q @ q.sin().mT * SCALE).softmax(-2) @ q)

    return s.step(fn, s.tokens())


def softmax_over_heads(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        return merge((q @ q.sin().mT * SCALE).softmax(1) @ q)

    return s.step(fn, s.tokens())


def softmax_twice(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        return merge((q @ q.sin().mT * SCALE).softmax(-1).softmax(-1) @ q)

    return s.step(fn, s.tokens())


def weights_scaled(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        return merge(((q @ q.sin().mT * SCALE).softmax(-1) * 0.5 + 0.01) @ q)

    return s.step(fn, s.tokens())


def weights_turned(s: Setting) -> Seen:
    """The weights are put on the wrong way round, on purpose."""

    def fn(x: Tensor) -> Tensor:
        q = split(x)
        return merge((q @ q.sin().mT * SCALE).softmax(-1).mT @ q)

    return s.step(fn, s.tokens())


def all_weights_dropped(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        return merge(F.scaled_dot_product_attention(q, q, q, dropout_p=1.0)) + x

    return s.step(fn, s.tokens())


def all_spelled_weights_dropped(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        weights = F.dropout((q @ q.mT).softmax(-1), p=1.0, training=True)
        return merge(weights @ q) + x

    return s.step(fn, s.tokens())


def dropout_of_a_negative_rate(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        return merge(F.dropout((q @ q.mT).softmax(-1), p=-0.5, training=True) @ q)

    return s.step(fn, s.tokens())


TRAPS = (
    unread_mask,
    weights_returned,
    weights_kept_elsewhere,
    bias_with_gradient,
    bias_of_heads_with_gradient,
    bias_from_tokens,
    mask_of_top_scores,
    mask_of_score_sign,
    mask_of_key_norms,
    mask_of_zero_tokens,
    mask_of_queries_only,
    mask_of_one_key,
    mask_of_another_length,
    mask_for_two_heads_and_batch,
    mask_buffer_changes,
    float_mask_buffer_changes,
    padding_comes_later,
    scale_buffer_changes,
    learned_scale,
    temperature_of_tokens,
    left_padding_of_lowest_numbers,
    left_padding_of_infinity,
    nothing_is_kept,
    softmax_over_queries,
    softmax_over_heads,
    softmax_twice,
    weights_scaled,
    weights_turned,
    all_weights_dropped,
    all_spelled_weights_dropped,
    dropout_of_a_negative_rate,
)
