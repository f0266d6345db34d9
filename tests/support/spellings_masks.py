"""Spellings of masks."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from support.spellings import D, Heads, Spelling, of_heads

SCALE = D**-0.5
WINDOW = 4


def of_scores(name: str, change: Callable[..., Tensor], *inputs: str) -> Spelling:
    """A row for a function of scores, before the softmax."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return change(q @ k.mT * SCALE, *more).softmax(-1) @ v

    return of_heads(name, attend, *inputs)


def of_sdpa(name: str, mask: Callable[..., Tensor], *inputs: str) -> Spelling:
    """A row for ``attn_mask``."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q, *more))

    return of_heads(name, attend, *inputs)


# ---- causal --------------------------------------------------------------------------


def added_infinity(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    return scores + torch.full((s, s), -math.inf).triu(diagonal=1)


def added_minimum(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    low = torch.finfo(scores.dtype).min
    mask = torch.full((s, s), low, dtype=scores.dtype)
    return scores + torch.triu(mask, 1)[None, None]


def added_in_two_steps(scores: Tensor) -> Tensor:
    """As libraries made their causal masks before SDPA."""
    s = scores.shape[-1]
    mask = torch.full((s, s), torch.finfo(scores.dtype).min, dtype=scores.dtype)
    position = torch.arange(s)
    mask.masked_fill_(position < (position + 1).view(s, 1), 0)
    return scores + mask[None, None, :, :].expand(scores.shape[0], 1, s, s)


def added_billion(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    return scores + (1.0 - torch.tril(torch.ones(s, s))) * -1e9


def subtracted(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    return scores - 1e9 * torch.ones(s, s).triu(1)


def where(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    keep = torch.ones(s, s, dtype=torch.bool).tril()
    return torch.where(keep, scores, torch.finfo(scores.dtype).min)


def where_of_tensors(scores: Tensor) -> Tensor:
    """GPT-2's, whose other branch is a tensor."""
    s = scores.shape[-1]
    keep = torch.tril(torch.ones((s, s), dtype=torch.uint8)).view(1, 1, s, s).bool()
    low = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return torch.where(keep, scores.to(scores.dtype), low)


def filled_triu(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    return scores.masked_fill(torch.ones(s, s).triu(1).bool(), -math.inf)


def filled_not_tril(scores: Tensor) -> Tensor:
    keep = torch.ones_like(scores, dtype=torch.bool).tril()
    return scores.masked_fill(~keep, float("-inf"))


def filled_tril_is_zero(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    return scores.masked_fill(torch.tril(torch.ones(s, s)) == 0, -1e9)


def filled_in_place(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    scores.masked_fill_(torch.ones(s, s, dtype=torch.bool).triu(1), -math.inf)
    return scores


def added_in_place(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    scores += torch.full((s, s), -math.inf).triu(1)
    return scores


def assigned(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    scores[:, :, torch.ones(s, s, dtype=torch.bool).triu(1)] = -math.inf
    return scores


def filled_from_arange(scores: Tensor) -> Tensor:
    position = torch.arange(scores.shape[-1])
    ahead = position[None, :] > position[:, None]
    return scores.masked_fill(ahead[None, None], -math.inf)


def compared_from_above(scores: Tensor) -> Tensor:
    """OPT's: the larger of a score and the lowest number."""
    s = scores.shape[-1]
    low = torch.finfo(scores.dtype).min
    scores = scores + torch.full((s, s), low, dtype=scores.dtype).triu(1)
    return torch.max(scores, torch.tensor(low, dtype=scores.dtype))


def before_the_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[2]
    found = (q @ k.mT).masked_fill(torch.ones(s, s).triu(1) != 0, -math.inf)
    return (found * SCALE).softmax(-1) @ v  # type: ignore[no-any-return]


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[2]
    found = k @ q.mT * SCALE
    found = found.masked_fill(torch.ones(s, s, dtype=torch.bool).tril(-1), -math.inf)
    return found.softmax(dim=-2).mT @ v  # type: ignore[no-any-return]


def baddbmm_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    mask = torch.full((s, s), -math.inf).triu(1).to(q.dtype).expand(b * h, s, s)
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    weights = torch.baddbmm(mask, q, k.mT, beta=1.0, alpha=SCALE).softmax(-1)
    return torch.bmm(weights, v).view(b, h, s, d)


def added_with_a_factor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[2]
    mask = torch.full((s, s), -math.inf).triu(1).to(q.dtype)
    return torch.add(mask, q @ k.mT, alpha=SCALE).softmax(-1) @ v


def weights_filled_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As speech toolkits do, so that an empty row gives zero."""
    s = q.shape[2]
    ahead = torch.ones(s, s, dtype=torch.bool).triu(1)
    found = (q @ k.mT * SCALE).masked_fill(ahead, -math.inf)
    return found.softmax(-1).masked_fill(ahead, 0.0) @ v  # type: ignore[no-any-return]


def exp_times_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[2]
    found = q @ k.mT * SCALE
    e = (found - found.amax(-1, keepdim=True)).exp() * torch.ones(s, s).tril()
    return (e / e.sum(-1, keepdim=True)).to(v.dtype) @ v  # type: ignore[no-any-return]


def exp_over_sum_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[2]
    e = (q @ k.mT * SCALE + torch.full((s, s), -math.inf).triu(1)).exp()
    return (e / e.sum(-1, keepdim=True)).to(v.dtype) @ v  # type: ignore[no-any-return]


class BoolBuffer(Heads):
    """A mask for the longest input, cut to this one's length."""

    keep: Tensor

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(self.attend_below)
        self.change = change
        keep = torch.tril(torch.ones(64, 64, dtype=torch.bool))
        self.register_buffer("keep", keep.view(1, 1, 64, 64), persistent=False)

    def attend_below(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.shape[2]
        found = self.change(q @ k.mT * SCALE, self.keep[:, :, :s, :s])
        return found.softmax(-1) @ v


class FloatBuffer(Heads):
    """nanoGPT's: ones and zeros, compared with 0; or 0 and -inf, added."""

    bias: Tensor

    def __init__(self, *, is_added: bool) -> None:
        super().__init__(self.attend_below)
        self.is_added = is_added
        ones = torch.ones(64, 64)
        ahead = torch.full((64, 64), -math.inf).triu(1)
        self.register_buffer("bias", ahead if is_added else ones.tril())

    def attend_below(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.shape[2]
        found, bias = q @ k.mT * SCALE, self.bias[:s, :s]
        found = (
            found + bias
            if self.is_added
            else found.masked_fill(bias == 0, float("-inf"))
        )
        return found.softmax(-1) @ v  # type: ignore[no-any-return]


# ---- windows, padding, documents -----------------------------------------------------


def near(scores: Tensor) -> Tensor:
    position = torch.arange(scores.shape[-1])
    far = (position[:, None] - position[None, :]).abs() > WINDOW
    return scores.masked_fill(far, torch.finfo(scores.dtype).min)


def near_and_before(scores: Tensor) -> Tensor:
    s = scores.shape[-1]
    band = torch.ones(s, s).tril().triu(-WINDOW)
    return scores.masked_fill(band == 0, -math.inf)


def same_piece(scores: Tensor) -> Tensor:
    piece = torch.arange(scores.shape[-1]) // WINDOW
    return scores.masked_fill(piece[:, None] != piece[None, :], -math.inf)


def prefix(scores: Tensor) -> Tensor:
    position = torch.arange(scores.shape[-1])
    keep = (position[None, :] <= position[:, None]) | (position[None, :] < 5)
    return torch.where(keep, scores, -math.inf)


def padding_bool(scores: Tensor, kept: Tensor) -> Tensor:
    return scores.masked_fill(~kept[:, None, None, :], -math.inf)


def padding_int(scores: Tensor, kept: Tensor) -> Tensor:
    return scores.masked_fill(kept[:, None, None] == 0, -1e9)


def padding_bert(scores: Tensor, kept: Tensor) -> Tensor:
    mask = kept.unsqueeze(1).unsqueeze(2).to(dtype=scores.dtype)
    return scores + (1.0 - mask) * -10000.0


def padding_minimum(scores: Tensor, kept: Tensor) -> Tensor:
    mask = kept[:, None, None, :].to(scores.dtype)
    return scores + (1.0 - mask) * torch.finfo(scores.dtype).min


def padding_billion(scores: Tensor, kept: Tensor) -> Tensor:
    return scores + (1 - kept[:, None, None]) * -1e9


def padding_inverted(scores: Tensor, kept: Tensor) -> Tensor:
    """As libraries expand a mask of the batch, for every query."""
    b, s = kept.shape
    mask = 1.0 - kept[:, None, None, :].expand(b, 1, s, s).to(scores.dtype)
    return scores + mask.masked_fill(mask.to(torch.bool), torch.finfo(mask.dtype).min)


def padding_floats_tested(scores: Tensor, kept: Tensor) -> Tensor:
    return scores.masked_fill(kept[:, None, None] == 0, -1e9)


def weights_filled_left(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """The first document's queries see no key at all, which gives zero."""
    ahead = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    hidden = ahead | (documents == 0)[:, None, None]
    low = torch.finfo(q.dtype).min
    weights = (q @ k.mT * SCALE).masked_fill(hidden, low).softmax(-1)
    return weights.masked_fill(hidden, 0.0) @ v  # type: ignore[no-any-return]


def causal_and_padding(scores: Tensor, kept: Tensor) -> Tensor:
    s = scores.shape[-1]
    keep = torch.ones(s, s, dtype=torch.bool).tril() & kept[:, None, None, :]
    return scores.masked_fill(~keep, torch.finfo(scores.dtype).min)


def causal_then_padding(scores: Tensor, kept: Tensor) -> Tensor:
    s = scores.shape[-1]
    scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -math.inf)
    return scores.masked_fill(kept[:, None, None] == 0, -math.inf)


def same_document(scores: Tensor, documents: Tensor) -> Tensor:
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return scores.masked_fill(same.logical_not(), -math.inf)


def same_document_before(q: Tensor, documents: Tensor) -> Tensor:
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()


def bmm_with_padding(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """A mask repeated for every head, beside batch and heads in one dim."""
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    pads = (~kept).repeat_interleave(h, dim=0)[:, None, :]
    weights = (torch.bmm(q, k.mT) * SCALE).masked_fill(pads, -math.inf).softmax(-1)
    return torch.bmm(weights, v).view(b, h, s, d)


def sdpa_float(q: Tensor) -> Tensor:
    s = q.shape[2]
    return torch.full((s, s), -math.inf, dtype=q.dtype).triu(1)


def sdpa_empty(q: Tensor) -> Tensor:
    """Some queries see no key at all, which gives zero."""
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(-1)
    return keep[None, None]


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)


def of_buffer(name: str, change: Callable[[Tensor, Tensor], Tensor]) -> Spelling:
    return Spelling(name, lambda: BoolBuffer(change))


def padded_outputs(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """The mask hides keys, and is put on the result too."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=kept[:, None, None])
    return out * kept[:, None, :, None].to(out.dtype)


TABLE = (
    of_scores("causal: -inf added", added_infinity),
    of_scores("causal: lowest number added", added_minimum),
    of_scores("causal: filled in place, then added", added_in_two_steps),
    of_scores("causal: -1e9 added", added_billion),
    of_scores("causal: 1e9 subtracted", subtracted),
    of_scores("causal: where", where),
    of_scores("causal: where of tensors", where_of_tensors),
    of_scores("causal: filled by triu", filled_triu),
    of_scores("causal: filled by not tril", filled_not_tril),
    of_scores("causal: filled by tril == 0", filled_tril_is_zero),
    of_scores("causal: scores filled in place", filled_in_place),
    of_scores("causal: added in place", added_in_place),
    of_scores("causal: assigned by index", assigned),
    of_scores("causal: from arange", filled_from_arange),
    of_scores("causal: max with the lowest number", compared_from_above),
    of_heads("causal: before the scale", before_the_scale),
    of_heads("causal: keys times queries", keys_first),
    of_heads("causal: baddbmm", baddbmm_causal),
    of_heads("causal: scores added with a factor", added_with_a_factor),
    of_heads("causal: weights filled again", weights_filled_again),
    of_heads("no key for some: filled again", weights_filled_left, "documents"),
    of_heads("causal: exp times mask", exp_times_mask),
    of_heads("causal: exp over sum", exp_over_sum_causal),
    of_buffer("causal: buffer of bools", lambda a, m: a.masked_fill(~m, -math.inf)),
    of_buffer("causal: buffer in where", lambda a, m: torch.where(m, a, -1e9)),
    Spelling("causal: buffer of ones", lambda: FloatBuffer(is_added=False)),
    Spelling("causal: buffer of -inf", lambda: FloatBuffer(is_added=True)),
    of_scores("window", near),
    of_scores("window: band of triangles", near_and_before),
    of_scores("pieces", same_piece),
    of_scores("prefix", prefix),
    of_scores("padding: bools", padding_bool, "kept"),
    of_scores("padding: ints", padding_int, "kept int"),
    of_scores("padding: BERT's -10000", padding_bert, "kept int"),
    of_scores("padding: lowest number", padding_minimum, "kept int"),
    of_scores("padding: -1e9 times floats", padding_billion, "kept float"),
    of_scores("padding: inverted and filled", padding_inverted, "kept int"),
    of_scores("padding: floats, tested", padding_floats_tested, "kept float"),
    of_scores("causal and padding", causal_and_padding, "kept"),
    of_scores("causal, then padding", causal_then_padding, "kept int"),
    of_heads("padding: bmm", bmm_with_padding, "kept"),
    of_scores("documents", same_document, "documents"),
    of_sdpa("documents: SDPA", same_document_before, "documents"),
    of_heads("SDPA: is_causal", sdpa_causal),
    of_heads("SDPA: scale", sdpa_scaled),
    of_sdpa("SDPA: floats", sdpa_float),
    of_sdpa("SDPA: no key for some", sdpa_empty),
    of_sdpa("SDPA: padding", lambda q, kept: kept[:, None, None], "kept"),
    of_heads("SDPA: padding, also of the result", padded_outputs, "kept"),
)
