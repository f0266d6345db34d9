"""Parts of more than one line; see ``rule_cases``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.rule_models import B, E, Part, RuleModel, V


def conv(layer: str) -> Part:
    return lambda m, h, i, k: getattr(m, layer)(h.transpose(1, 2)).transpose(1, 2)


def targets(ids: Tensor) -> Tensor:
    return ids % V


def ce(**options: Any) -> Part:  # noqa: ANN401
    def part(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        return F.cross_entropy(
            m.head(h).flatten(0, 1), targets(ids).flatten(), **options
        )

    return part


def ce_t(**options: Any) -> Part:  # noqa: ANN401
    def part(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        return F.cross_entropy(m.head(h).transpose(1, 2), targets(ids), **options)

    return part


def ce_w(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    loss = F.cross_entropy(
        m.head(h).flatten(0, 1), targets(ids).flatten(), reduction="none"
    )
    w = keep.flatten().to(h.dtype)
    return (loss * w).sum() / w.sum()


def class_weights(reduction: str, **o: Any) -> Part:  # noqa: ANN401
    def part(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        return F.cross_entropy(
            m.head(h).flatten(0, 1),
            targets(ids).flatten(),
            weight=m.scale[:V].to(h.dtype),
            reduction=reduction,
            **o,
        )

    return part


def zloss(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    z = m.head(h).logsumexp(-1)
    loss: Tensor = (z * z).mean()
    return loss


def chunked(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    logits = m.head(h).flatten(0, 1)
    t = targets(ids).flatten()
    total = logits.new_zeros(())
    for a, b in zip(logits.chunk(4), t.chunk(4), strict=True):
        total = total + F.cross_entropy(a, b, reduction="sum")
    mean: Tensor = total / t.numel()
    return mean


def chunked_s(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    t = targets(ids)
    total = h.new_zeros(())
    for a, b in zip(h.chunk(3, 1), t.chunk(3, 1), strict=True):
        total = total + F.cross_entropy(
            m.head(a).flatten(0, 1), b.flatten(), reduction="sum"
        )
    return total / t.numel()


def shifted(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    logits = m.head(h)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), targets(ids)[:, 1:].flatten())


def hf(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    logits = m.head(h)
    labels = F.pad(targets(ids), (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), ignore_index=-100)


def experts(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    t = h.flatten(0, 1)
    w, sel = m.head(t).softmax(-1).topk(2, -1)
    mask = F.one_hot(sel, V)
    out = torch.zeros_like(t)
    for e in range(V):
        out = out + (mask[..., e] * w).sum(-1, keepdim=True) * (t * (e + 1)).sin()
    return out.view_as(h)


def router_scatter(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    logits = m.head(h)
    w, sel = logits.topk(2, -1)
    full = torch.full_like(logits, -1e9).scatter(-1, sel, w)
    return full.softmax(-1)


def index_add(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    t = h.flatten(0, 1)
    out = torch.zeros_like(t)
    return out.index_add(0, torch.arange(t.shape[0] - 1, -1, -1), t.sin()).view_as(h)


def masked_scatter(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    mask = (ids % 3 == 0).unsqueeze(-1).expand_as(h)
    return m.again(h.masked_scatter(mask, m.positions[0].repeat(2, 1)))


def index_put(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = m.query
    return h


def fill_in(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    h = h.clone()
    h[..., 0] = 3.0
    return m.again(h)


def sin_pos(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    pos = torch.arange(h.shape[1], dtype=h.dtype)
    f = torch.exp(torch.arange(0, E, 2, dtype=h.dtype) * -0.3)
    a = pos[:, None] * f
    return m.again(h + torch.stack([a.sin(), a.cos()], -1).flatten(1))


def rotary(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    pos = (keep.long().cumsum(1) - 1).clamp(min=0)
    f = torch.exp(torch.arange(0, E, 2, dtype=h.dtype) * -0.3)
    a = pos[..., None] * f
    a = torch.cat([a, a], -1)
    rot = torch.cat([-h[..., E // 2 :], h[..., : E // 2]], -1)
    return m.again(h * a.cos() + rot * a.sin())


def token_shift(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return m.again(h + F.pad(h, (0, 0, 1, -1)))


def shift_cat(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return m.again(h + torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1))


def xcit(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    q = F.normalize(h, dim=1)
    return h @ (q.transpose(1, 2) @ q).softmax(-1)


def linear_attention(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    q, kk = F.elu(h) + 1, F.elu(h.sin()) + 1
    return (q @ (kk.transpose(1, 2) @ h)) / (q * kk.sum(1, keepdim=True)).sum(
        -1, keepdim=True
    )


def pool_attn(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    w = (h @ m.query).softmax(1)
    return torch.einsum("bs,bse->be", w, h)


def masked_pool(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    w = keep.unsqueeze(-1).to(h.dtype)
    return (h * w).sum(1) / w.sum(1).clamp(min=1e-9)


def last_token(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    scores: Tensor = m.head(h)
    return scores[torch.arange(B), keep.long().sum(1) - 1]


def se(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return m.again(h * m.second(h.mean(1)).sigmoid().unsqueeze(1))


def split_prefix(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    a, b = h.split([2, h.shape[1] - 2], 1)
    return torch.cat([a.sin(), b.cos()], 1)


def unbind(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return torch.stack(h.unbind(1)[::-1], 1)
