"""Small models, one for each op class that a rule must know.

A case is a function of the model's parameters, an attention's output ``h`` (B, S, E),
ids and a padding mask; its last op is under test, some attend once more behind it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, E, V = 2, 8, 5
LONGEST = 40

Part = Callable[["RuleModel", Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class RuleCase:
    """One op class.

    Attributes:
        name: of the case.
        part: what comes after the first attention.
        gathers: the ops that need the whole sequence, in order.
        rings: attentions that become rings, the first included.
    """

    name: str
    part: Part
    gathers: tuple[str, ...] = ()
    rings: int = 1


def attend(x: Tensor, *, is_causal: bool = True) -> Tensor:
    """Two heads on one stream."""
    q = x.unflatten(-1, (2, E // 2)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, q.sin(), q, is_causal=is_causal)
    return out.transpose(1, 2).flatten(2)


class RuleModel(nn.Module):
    """Linear, attention, then the part under test, with what parts may need."""

    def __init__(self, part: Part, *, is_causal: bool) -> None:
        super().__init__()
        self.part = part
        self.is_causal = is_causal
        self.first = nn.Linear(E, E)
        self.second = nn.Linear(E, E)
        self.head = nn.Linear(E, V)
        self.cls = nn.Parameter(torch.randn(1, 1, E))
        self.positions = nn.Parameter(torch.randn(1, LONGEST, E))
        self.table = nn.Embedding(LONGEST, E)
        self.conv = nn.Conv1d(E, E, 3, padding=1)
        self.depthwise = nn.Conv1d(E, E, 4, padding=3, groups=E)
        self.strided = nn.Conv1d(E, E, 3, stride=2, padding=1)
        self.batch_norm = nn.BatchNorm1d(E)
        self.group_norm = nn.GroupNorm(2, E)
        self.query = nn.Parameter(torch.randn(E))
        self.register_buffer("scale", torch.linspace(1, 2, E))

    def forward(self, x: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        """The first attention and the part."""
        h = attend(self.first(x), is_causal=self.is_causal)
        return self.part(self, h, ids, keep)

    def again(self, x: Tensor) -> Tensor:
        """Another attention."""
        return attend(self.second(x), is_causal=self.is_causal)


# ruff: noqa: E501, ANN, D103
def _conv(layer):
    return lambda m, h, i, k: getattr(m, layer)(h.transpose(1, 2)).transpose(1, 2)


def _targets(ids):
    return ids % V


def _ce(**options):
    def part(m, h, ids, k):
        return F.cross_entropy(
            m.head(h).flatten(0, 1), _targets(ids).flatten(), **options
        )

    return part


def _ce_t(**options):
    def part(m, h, ids, k):
        return F.cross_entropy(m.head(h).transpose(1, 2), _targets(ids), **options)

    return part


def _ce_w(m, h, ids, k, **o):
    loss = F.cross_entropy(
        m.head(h).flatten(0, 1), _targets(ids).flatten(), reduction="none"
    )
    w = k.flatten().to(h.dtype)
    return (loss * w).sum() / w.sum()


def _class_weights(reduction, **o):
    def part(m, h, ids, k):
        return F.cross_entropy(
            m.head(h).flatten(0, 1),
            _targets(ids).flatten(),
            weight=m.scale[:V].to(h.dtype),
            reduction=reduction,
            **o,
        )

    return part


def _zloss(m, h, ids, k):
    z = m.head(h).logsumexp(-1)
    return (z * z).mean()


def _chunked(m, h, ids, k):
    logits = m.head(h).flatten(0, 1)
    t = _targets(ids).flatten()
    total = 0
    for a, b in zip(logits.chunk(4), t.chunk(4)):
        total = total + F.cross_entropy(a, b, reduction="sum")
    return total / t.numel()


def _chunked_s(m, h, ids, k):
    t = _targets(ids)
    total = 0
    for a, b in zip(h.chunk(3, 1), t.chunk(3, 1)):
        total = total + F.cross_entropy(
            m.head(a).flatten(0, 1), b.flatten(), reduction="sum"
        )
    return total / t.numel()


def _shifted(m, h, ids, k):
    logits = m.head(h)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), _targets(ids)[:, 1:].flatten())


def _hf(m, h, ids, k):
    logits = m.head(h)
    labels = F.pad(_targets(ids), (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), ignore_index=-100)


def _experts(m, h, ids, k):
    t = h.flatten(0, 1)
    w, sel = m.head(t).softmax(-1).topk(2, -1)
    mask = F.one_hot(sel, V)
    out = 0
    for e in range(V):
        out = out + (mask[..., e] * w).sum(-1, keepdim=True) * (t * (e + 1)).sin()
    return out.view_as(h)


def _router_scatter(m, h, ids, k):
    logits = m.head(h)
    w, sel = logits.topk(2, -1)
    full = torch.full_like(logits, -1e9).scatter(-1, sel, w)
    return full.softmax(-1)


def _index_add(m, h, ids, k):
    t = h.flatten(0, 1)
    out = torch.zeros_like(t)
    return out.index_add(0, torch.arange(t.shape[0] - 1, -1, -1), t.sin()).view_as(h)


def _masked_scatter(m, h, ids, k):
    mask = (ids % 3 == 0).unsqueeze(-1).expand_as(h)
    return m.again(h.masked_scatter(mask, m.positions[0].repeat(2, 1)))


def _index_put(m, h, ids, k):
    h = h.clone()
    h[:, 0] = m.query
    return h


def _fill_in(m, h, ids, k):
    h = h.clone()
    h[..., 0] = 3.0
    return m.again(h)


def _sin_pos(m, h, ids, k):
    pos = torch.arange(h.shape[1], dtype=h.dtype)
    f = torch.exp(torch.arange(0, E, 2, dtype=h.dtype) * -0.3)
    a = pos[:, None] * f
    return m.again(h + torch.stack([a.sin(), a.cos()], -1).flatten(1))


def _rotary(m, h, ids, k):
    pos = (k.long().cumsum(1) - 1).clamp(min=0)
    f = torch.exp(torch.arange(0, E, 2, dtype=h.dtype) * -0.3)
    a = pos[..., None] * f
    a = torch.cat([a, a], -1)
    rot = torch.cat([-h[..., E // 2 :], h[..., : E // 2]], -1)
    return m.again(h * a.cos() + rot * a.sin())


def _token_shift(m, h, ids, k):
    return m.again(h + F.pad(h, (0, 0, 1, -1)))


def _shift_cat(m, h, ids, k):
    return m.again(h + torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1))


def _xcit(m, h, ids, k):
    q = F.normalize(h, dim=1)
    return h @ (q.transpose(1, 2) @ q).softmax(-1)


def _linear_attention(m, h, ids, k):
    q, kk = F.elu(h) + 1, F.elu(h.sin()) + 1
    return (q @ (kk.transpose(1, 2) @ h)) / (q * kk.sum(1, keepdim=True)).sum(
        -1, keepdim=True
    )


def _pool_attn(m, h, ids, k):
    w = (h @ m.query).softmax(1)
    return torch.einsum("bs,bse->be", w, h)


def _masked_pool(m, h, ids, k):
    w = k.unsqueeze(-1).to(h.dtype)
    return (h * w).sum(1) / w.sum(1).clamp(min=1e-9)


def _last_token(m, h, ids, k):
    return m.head(h)[torch.arange(B), k.long().sum(1) - 1]


def _se(m, h, ids, k):
    return m.again(h * m.second(h.mean(1)).sigmoid().unsqueeze(1))


def _split_prefix(m, h, ids, k):
    a, b = h.split([2, h.shape[1] - 2], 1)
    return torch.cat([a.sin(), b.cos()], 1)


def _unbind(m, h, ids, k):
    return torch.stack(h.unbind(1)[::-1], 1)


C = RuleCase
CASES = [
    # shifts
    C("slice 1:", lambda m, h, i, k: h[:, 1:].sin()),
    C("slice :-1", lambda m, h, i, k: h[:, :-1].sin()),
    C("slice log", lambda m, h, i, k: (h[:, 1:] * 2).exp().mean(1)),
    C("slice twice", lambda m, h, i, k: h[:, 1:][:, :-1].softmax(1)),
    C("slice minus", lambda m, h, i, k: h[:, 1:] - h[:, :-1]),
    C("slice same", lambda m, h, i, k: h[:, 2:] * h.sin()[:, 2:] + m.positions[:, : h.shape[1] - 2]),
    C("slice flat", lambda m, h, i, k: (m.head(h[:, 1:]).flatten(0, 1) / (1 + m.positions[0, :2, :V].sum(0))).sum(0)),
    C("slice matmul", lambda m, h, i, k: h[:, 1:].transpose(1, 2) @ h[:, 1:].cos()),
    C("slice nan", lambda m, h, i, k: (h[:, :-1] - h[:, -1:].detach()).norm(dim=-1).log()),
    C("ce shifted none", lambda m, h, i, k: (F.cross_entropy(m.head(h)[:, :-1].flatten(0, 1), _targets(i)[:, 1:].flatten(), reduction="none") * k[:, 1:].flatten()).sum()),
    C("ce shifted transposed", lambda m, h, i, k: F.cross_entropy(m.head(h)[:, :-1].transpose(1, 2), _targets(i)[:, 1:])),
    C("gather logp shifted", lambda m, h, i, k: -m.head(h)[:, :-1].log_softmax(-1).gather(-1, _targets(i)[:, 1:, None]).squeeze(-1).mean()),
    C("slice then attend", lambda m, h, i, k: m.again(h[:, 1:]), rings=2),
    C("slice stride", lambda m, h, i, k: h[:, ::2].sin()),
    C("narrow", lambda m, h, i, k: h.narrow(1, 2, 5).sin()),
    C("roll", lambda m, h, i, k: m.again(torch.roll(h, 3, 1)), rings=2),
    C("pad shift", _token_shift, rings=2),
    C("cat shift", _shift_cat, rings=2),
    C("pad then attend", lambda m, h, i, k: m.again(F.pad(h, (0, 0, 2, 1))), rings=2),
    C(
        "cat cls",
        lambda m, h, i, k: m.again(torch.cat([m.cls.expand(B, 1, E), h], 1))[:, 0],
        rings=2,
    ),
    C(
        "cat cls tokens",
        lambda m, h, i, k: m.again(torch.cat([m.cls.expand(B, 1, E), h], 1))[:, 1:],
        rings=2,
    ),
    C("cat two", lambda m, h, i, k: m.again(torch.cat([h, h.sin()], 1)), rings=2),
    C("flip", lambda m, h, i, k: m.again(h.flip(1)), rings=2),
    C("cumsum", lambda m, h, i, k: m.again(h.cumsum(1)), rings=2),
    C("diff", lambda m, h, i, k: h.diff(dim=1).sin()),
    C("split", _split_prefix),
    C("chunk", lambda m, h, i, k: torch.cat([t.sin() for t in h.chunk(3, 1)], 1)),
    C("unbind", _unbind),
    C("conv", _conv("conv")),
    C(
        "depthwise conv",
        lambda m, h, i, k: m.depthwise(h.transpose(1, 2))[..., :-3].transpose(1, 2),
    ),
    C("strided conv", _conv("strided")),
    C(
        "avg_pool",
        lambda m, h, i, k: F.avg_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    ),
    C(
        "max_pool",
        lambda m, h, i, k: F.max_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    ),
    C("unfold", lambda m, h, i, k: h.unfold(1, 3, 1).sum(-1)),
    C("repeat_interleave", lambda m, h, i, k: h.repeat_interleave(2, 1)),
    C("repeat", lambda m, h, i, k: h.repeat(1, 2, 1)),
    # reductions
    C("mean", lambda m, h, i, k: h.mean(1)),
    C("sum keepdim", lambda m, h, i, k: h - h.sum(1, keepdim=True)),
    C("max", lambda m, h, i, k: h.max(1).values),
    C("max indices", lambda m, h, i, k: h.max(1).indices * 1.0 + h.sum()),
    C("amax", lambda m, h, i, k: h.amax(1)),
    C("amax all", lambda m, h, i, k: h.amax()),
    C("max all", lambda m, h, i, k: h.max()),
    C("amin", lambda m, h, i, k: h.amin((1, 2))),
    C("amax tie", lambda m, h, i, k: (h > 0).to(h.dtype).mul(h.mean()).amax(1)),
    C("logsumexp", lambda m, h, i, k: h.logsumexp(1)),
    C("norm", lambda m, h, i, k: h.norm(dim=1)),
    C("vector_norm all", lambda m, h, i, k: torch.linalg.vector_norm(h)),
    C("normalize", lambda m, h, i, k: F.normalize(h, dim=1)),
    C("norm 1", lambda m, h, i, k: h.norm(p=1, dim=1)),
    C("var", lambda m, h, i, k: h.var(1)),
    C("var all", lambda m, h, i, k: h.var()),
    C(
        "std keepdim",
        lambda m, h, i, k: (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True),
    ),
    C("var_mean", lambda m, h, i, k: torch.var_mean(h, 1)[0]),
    C("softmax", lambda m, h, i, k: h.softmax(1)),
    C("log_softmax", lambda m, h, i, k: h.log_softmax(1)),
    C("any", lambda m, h, i, k: (h > 0.3).any(1) * h.sum()),
    C("all", lambda m, h, i, k: (h > -0.3).all(1) * h.sum()),
    C("argmax", lambda m, h, i, k: h.argmax(1) * 1.0 + h.sum()),
    C("prod", lambda m, h, i, k: h.prod(1)),
    C("count_nonzero", lambda m, h, i, k: (h > 0).sum(1) * h.sum()),
    C("first token", lambda m, h, i, k: h[:, 0]),
    C("last token", lambda m, h, i, k: h[:, -1]),
    C("last by index", _last_token),
    C("masked mean", _masked_pool),
    C(
        "gather S",
        lambda m, h, i, k: h.gather(1, (i % 7)[:, :4, None].expand(-1, -1, E)),
    ),
    C("index_select", lambda m, h, i, k: h.index_select(1, torch.tensor([3, 1, 5]))),
    C("index list", lambda m, h, i, k: h[:, [3, 1, 5]]),
    C("index mask", lambda m, h, i, k: torch.where(k[..., None], h, m.cls)),
    C("topk S", lambda m, h, i, k: h.topk(2, 1).values),
    C("linear attention", _linear_attention),
    C("pool attention", _pool_attn),
    C("xcit", _xcit),
    C("outer einsum", lambda m, h, i, k: torch.einsum("bse,bsf->bef", h, h.sin())),
    C("bmm", lambda m, h, i, k: torch.bmm(h.transpose(1, 2), h.sin())),
    C(
        "einsum three",
        lambda m, h, i, k: torch.einsum("bse,bsf,bs->bef", h, h.sin(), h[..., 0]),
    ),
    C(
        "einsum local",
        lambda m, h, i, k: torch.einsum("bse,fe->bsf", h, m.second.weight),
    ),
    C(
        "einsum heads",
        lambda m, h, i, k: torch.einsum(
            "bshd,hdo->bso", h.unflatten(-1, (2, 4)), m.second.weight.view(2, 4, E)
        ),
    ),
    C("tensordot", lambda m, h, i, k: torch.tensordot(h, m.second.weight, ([2], [1]))),
    C("weight S", lambda m, h, i, k: h.transpose(1, 2) @ m.positions[0, : h.shape[1]]),
    C(
        "mixer",
        lambda m, h, i, k: F.linear(
            h.transpose(1, 2),
            (m.positions[0, : h.shape[1]] @ m.positions[0, : h.shape[1]].T),
        ).transpose(1, 2),
    ),
    C("squeeze excite", _se, rings=2),
    C(
        "adaptive pool",
        lambda m, h, i, k: F.adaptive_avg_pool1d(h.transpose(1, 2), 1).flatten(1),
    ),
    # positions
    C(
        "table arange",
        lambda m, h, i, k: m.again(h + m.table(torch.arange(h.shape[1]))),
        rings=2,
    ),
    C(
        "learned slice",
        lambda m, h, i, k: m.again(h + m.positions[:, : h.shape[1]]),
        rings=2,
    ),
    C("sinusoidal", _sin_pos, rings=2),
    C("rotary", _rotary, rings=2),
    # losses
    C("ce mean", _ce()),
    C("ce sum", _ce(reduction="sum")),
    C("ce none", _ce(reduction="none")),
    C("ce smooth", _ce(label_smoothing=0.1)),
    C("ce ignore", _ce(ignore_index=2)),
    C("ce smooth ignore", _ce(label_smoothing=0.1, ignore_index=2)),
    C("ce weights", _class_weights("mean")),
    C("ce weights sum", _class_weights("sum")),
    C("ce weights smooth", _class_weights("mean", label_smoothing=0.1)),
    C("ce per token", _ce_w),
    C("ce transposed", _ce_t()),
    C("ce transposed smooth none", _ce_t(label_smoothing=0.1, reduction="none")),
    C(
        "ce soft",
        lambda m, h, i, k: F.cross_entropy(
            m.head(h).flatten(0, 1), m.positions[0, :5, :V].softmax(-1)[i.flatten() % 5]
        ),
    ),
    C("ce shifted", _shifted),
    C("ce hf", _hf),
    C("ce chunked tokens", _chunked),
    C("ce chunked S", _chunked_s),
    C("z-loss", _zloss),
    C(
        "nll",
        lambda m, h, i, k: F.nll_loss(
            m.head(h).log_softmax(-1).flatten(0, 1), _targets(i).flatten()
        ),
    ),
    C(
        "nll transposed",
        lambda m, h, i, k: F.nll_loss(
            m.head(h).log_softmax(-1).transpose(1, 2), _targets(i), reduction="sum"
        ),
    ),
    C(
        "gather logp",
        lambda m, h, i, k: (
            -m.head(h)
            .log_softmax(-1)
            .gather(-1, _targets(i)[..., None])
            .squeeze(-1)
            .mean()
        ),
    ),
    C(
        "bce",
        lambda m, h, i, k: F.binary_cross_entropy_with_logits(h[..., 0], k.to(h.dtype)),
    ),
    C(
        "bce weight",
        lambda m, h, i, k: F.binary_cross_entropy_with_logits(
            h,
            k[..., None].to(h.dtype).expand(-1, -1, E),
            weight=m.scale.to(h.dtype),
            pos_weight=m.scale.to(h.dtype),
            reduction="sum",
        ),
    ),
    C(
        "mse",
        lambda m, h, i, k: F.mse_loss(h, m.positions[:, : h.shape[1]].expand_as(h)),
    ),
    C(
        "mse sharded",
        lambda m, h, i, k: F.mse_loss(h, h.sin(), reduction="none").mean(),
    ),
    C("l1", lambda m, h, i, k: F.l1_loss(h, h.sin())),
    C("smooth l1", lambda m, h, i, k: F.smooth_l1_loss(h, h.sin())),
    C("huber", lambda m, h, i, k: F.huber_loss(h, h.sin(), reduction="sum")),
    C(
        "kl",
        lambda m, h, i, k: F.kl_div(
            h.log_softmax(-1),
            m.positions[:, : h.shape[1]].softmax(-1).expand_as(h),
            reduction="batchmean",
        ),
    ),
    C("kl mean", lambda m, h, i, k: F.kl_div(h.log_softmax(-1), h.sin().softmax(-1))),
    C("cosine", lambda m, h, i, k: F.cosine_similarity(h, h.sin(), -1).mean()),
    # norms
    C("batch norm", _conv("batch_norm")),
    C(
        "batch norm eval",
        lambda m, h, i, k: F.batch_norm(
            h.transpose(1, 2),
            m.scale.to(h.dtype),
            m.scale.to(h.dtype),
            m.query,
            m.query,
            False,
        ).transpose(1, 2),
    ),
    C(
        "batch norm flat",
        lambda m, h, i, k: F.batch_norm(
            h.flatten(0, 1), None, None, m.query, m.query, True
        ).view_as(h),
    ),
    C("group norm", _conv("group_norm")),
    C(
        "instance norm",
        lambda m, h, i, k: F.instance_norm(h.transpose(1, 2)).transpose(1, 2),
    ),
    C("layer norm", lambda m, h, i, k: F.layer_norm(h, (E,), m.query)),
    C("rms norm", lambda m, h, i, k: F.rms_norm(h, (E,), m.query)),
    # dropout that drops nothing
    C("dropout p0", lambda m, h, i, k: F.dropout(h, 0.0, True)),
    C("dropout eval", lambda m, h, i, k: F.dropout(h, 0.5, False)),
    # routing
    C("experts", _experts),
    C("router scatter", _router_scatter),
    C("index_add", _index_add),
    C("masked_scatter", _masked_scatter, rings=2),
    C("index_put", _index_put),
    C("fill feature", _fill_in, rings=2),
    C("one_hot argmax", lambda m, h, i, k: F.one_hot(h.argmax(-1), E).to(h.dtype) * h),
    C("cumsum features", lambda m, h, i, k: h.cumsum(-1)),
    C(
        "scatter_add features",
        lambda m, h, i, k: torch.zeros_like(h).scatter_add(-1, h.argsort(-1), h),
    ),
    C("unknown", lambda m, h, i, k: torch.fft.fft(h, dim=1).real),
    C("movedim", lambda m, h, i, k: h.movedim(1, 0).sin().movedim(0, 1)),
    C(
        "rearrange",
        lambda m, h, i, k: (
            h.view(B, -1, 2, 4)
            .permute(0, 2, 1, 3)
            .reshape(B * 2, -1, 4)
            .sin()
            .view(B, 2, -1, 4)
            .transpose(1, 2)
            .reshape(B, -1, E)
        ),
    ),
    C("repeat features", lambda m, h, i, k: h.repeat(1, 1, 2)),
    C("repeat_interleave features", lambda m, h, i, k: h.repeat_interleave(2, -1)),
    C("unbind features", lambda m, h, i, k: h.unflatten(-1, (2, 4)).unbind(-2)[0]),
    C("tile batch", lambda m, h, i, k: h.repeat(2, 1, 1)),
    C("select batch", lambda m, h, i, k: h[0].sin()),
    C("index batch", lambda m, h, i, k: h[torch.tensor([1, 0])].sin()),
    C("tril features", lambda m, h, i, k: h.unsqueeze(-1).expand(-1, -1, -1, E).tril()),
    C(
        "baddbmm",
        lambda m, h, i, k: torch.baddbmm(
            m.positions[:, : h.shape[1]].expand_as(h),
            h,
            m.second.weight.expand(B, E, E),
        ),
    ),
    C(
        "bilinear",
        lambda m, h, i, k: F.bilinear(
            h, h.sin(), m.positions[0, : V * E].view(-1, E, E)[:V]
        ),
    ),
    C("glu", lambda m, h, i, k: F.glu(h, -1)),
    C("prelu", lambda m, h, i, k: F.prelu(h.transpose(1, 2), m.query).transpose(1, 2)),
    C("normalize last", lambda m, h, i, k: F.normalize(h, dim=-1)),
    C("detach", lambda m, h, i, k: h.detach() * h),
    C("where mean", lambda m, h, i, k: torch.where(h > h.mean(), h, h.min())),
    C("atan2", lambda m, h, i, k: torch.atan2(h, h.sin())),
    C("lerp", lambda m, h, i, k: torch.lerp(h, h.sin(), 0.3)),
    C("addcmul", lambda m, h, i, k: torch.addcmul(h, h, m.query)),
    C("isnan", lambda m, h, i, k: torch.nan_to_num(h)),
    C("sort S", lambda m, h, i, k: h.sort(1).values),
    C("cdist", lambda m, h, i, k: torch.cdist(h, m.positions[:, :3].expand(B, -1, -1))),
    C(
        "interpolate",
        lambda m, h, i, k: F.interpolate(h.transpose(1, 2), scale_factor=2).transpose(
            1, 2
        ),
    ),
    C(
        "log_softmax float",
        lambda m, h, i, k: h.softmax(-1, dtype=torch.float32).to(h.dtype),
    ),
    C(
        "view dtype",
        lambda m, h, i, k: (
            h.new_zeros(B, h.shape[1], E)
            + h
            + h.new_ones(h.shape)
            + torch.zeros(h.shape, dtype=h.dtype)
        ),
    ),
    C("math", lambda m, h, i, k: h * math.sqrt(h.shape[1])),
]
