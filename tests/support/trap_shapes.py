"""Traps of shapes: none, few, equal, others, or those that the data decides."""

import torch
import torch.nn.functional as F
from torch import Tensor

from support.traps import (
    B,
    E,
    S,
    Seen,
    Setting,
    attend,
    merge,
    run_step,
    split,
)

# ---- shapes --------------------------------------------------------------------------


def one_token(s: Setting) -> Seen:
    return s.step(lambda x: attend(x) * 2, s.tokens(B, 1, E))


def one_token_unmasked(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        return merge((q @ q.mT).softmax(-1) @ q.sin())

    return s.step(fn, s.tokens(B, 1, E))


def fewer_tokens_than_ranks(s: Setting) -> Seen:
    return s.step(lambda x: attend(x).sum(1), s.tokens(B, 3, E))


def two_tokens(s: Setting) -> Seen:
    return s.step(lambda x: attend(x)[:, -1] + attend(x).mean(1), s.tokens(B, 2, E))


def all_sizes_equal(s: Setting) -> Seen:
    """B = H = S = D = 4: no dim is told by its size."""

    def fn(x: Tensor, mask: Tensor) -> Tensor:
        q = x.sin()
        out = F.scaled_dot_product_attention(q, x, q, attn_mask=mask)
        return out.transpose(0, 1) + out.transpose(1, 3)

    kept = torch.rand(4, 4, 4, 4, generator=torch.Generator().manual_seed(3)) > 0.4
    kept = kept | torch.eye(4, dtype=torch.bool)
    return s.step(fn, s.tokens(4, 4, 4, 4), kept)


def lengths_change(s: Setting) -> Seen:
    call = s.compile(lambda x: attend(x) * 2)
    seen: Seen = {}
    for length in (S, 9, 16, 5):
        found = run_step(call, s.tokens(B, length, E))
        seen |= {f"{length} {n}": x for n, x in found.items()}
    return seen


def values_wider_than_keys(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(x)
        v = torch.cat([q, q.sin()], -1)
        return merge(F.scaled_dot_product_attention(q, q, v, is_causal=True))

    return s.step(fn, s.tokens())


def causal_of_other_lengths(s: Setting) -> Seen:
    """``is_causal`` over fewer keys keeps the upper left corner."""

    def fn(x: Tensor) -> Tensor:
        q = split(x)
        return merge(
            F.scaled_dot_product_attention(q, q[:, :, :7], q[:, :, :7], is_causal=True)
        )

    return s.step(fn, s.tokens())


def keys_turned_round(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(attend(x))
        k = q.flip(2)
        return merge(F.scaled_dot_product_attention(q, k, k.sin(), is_causal=True))

    return s.step(fn, s.tokens())


def keys_rolled(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(attend(x))
        k = q.roll(1, 2)
        return merge(F.scaled_dot_product_attention(q, k, q, is_causal=True))

    return s.step(fn, s.tokens())


def keys_of_another_order_than_values(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        q = split(attend(x))
        order = torch.arange(S - 1, -1, -1)
        return merge(F.scaled_dot_product_attention(q, q[:, :, order], q))

    return s.step(fn, s.tokens())


def past_keys(s: Setting) -> Seen:
    """Keys and values of earlier tokens come first."""

    def fn(x: Tensor, past: Tensor) -> Tensor:
        q, k = split(x), torch.cat([split(past), split(x)], 2)
        kept = torch.ones(S, k.shape[2], dtype=torch.bool).tril(k.shape[2] - S)
        return merge(F.scaled_dot_product_attention(q, k, k.sin(), attn_mask=kept))

    return s.step(fn, s.tokens(), s.tokens(B, 5, E, seed=2))


# ---- data-dependent shapes -----------------------------------------------------------


def chosen_tokens(s: Setting) -> Seen:
    kept = torch.arange(S) < torch.tensor([[S], [5]])
    return s.step(lambda x, m: attend(x)[m] * 2, s.tokens(), kept)


def positive_values(s: Setting) -> Seen:
    return s.step(lambda x: torch.masked_select(attend(x), x > 0) * 2, s.tokens())


def attention_over_chosen_tokens(s: Setting) -> Seen:
    kept = torch.arange(S) % 3 != 1

    def fn(x: Tensor, kept: Tensor) -> Tensor:
        return attend(x[:, kept.nonzero().squeeze(1)]) * 2

    return s.step(fn, s.tokens(), kept)


def length_by_item(s: Setting) -> Seen:
    def fn(x: Tensor, kept: Tensor) -> Tensor:
        length = int(kept.sum().item())
        position = torch.arange(length)
        return attend(x[:, :length], position[:, None] >= position) * 2

    return s.step(fn, s.tokens(), torch.arange(S) < 9)


def window_by_item(s: Setting) -> Seen:
    def fn(x: Tensor, width: Tensor) -> Tensor:
        position = torch.arange(S)
        near = (position[:, None] - position).abs() <= width.item()
        return attend(x, near)

    return s.step(fn, s.tokens(), torch.tensor(3))


def window_by_tensor(s: Setting) -> Seen:
    def fn(x: Tensor, width: Tensor) -> Tensor:
        position = torch.arange(S)
        return attend(x, (position[:, None] - position).abs() <= width)

    call = s.compile(fn)
    first = run_step(call, s.tokens(), torch.tensor(3))
    second = run_step(call, s.tokens(), torch.tensor(1))
    return first | {f"second {n}": x for n, x in second.items()}


def branch_on_a_value(s: Setting) -> Seen:
    def fn(x: Tensor) -> Tensor:
        y = attend(x)
        return y * 2 if y.sum() > 0 else y * 3

    return s.step(fn, s.tokens())


TRAPS = (
    one_token,
    one_token_unmasked,
    fewer_tokens_than_ranks,
    two_tokens,
    all_sizes_equal,
    lengths_change,
    values_wider_than_keys,
    causal_of_other_lengths,
    keys_turned_round,
    keys_rolled,
    keys_of_another_order_than_values,
    past_keys,
    chosen_tokens,
    positive_values,
    attention_over_chosen_tokens,
    length_by_item,
    window_by_item,
    window_by_tensor,
    branch_on_a_value,
)
