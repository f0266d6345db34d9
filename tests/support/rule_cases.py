"""One case for each op class: what moves, reduces or knows the sequence."""

import torch
import torch.nn.functional as F

from support import rule_parts as parts
from support.rule_models import B, E, RuleCase, V

C = RuleCase
SEQUENCE_CASES = [
    # shifts
    C("slice 1:", lambda m, h, i, k: h[:, 1:].sin()),
    C("slice :-1", lambda m, h, i, k: h[:, :-1].sin()),
    C("slice log", lambda m, h, i, k: (h[:, 1:] * 2).exp().mean(1)),
    C("slice twice", lambda m, h, i, k: h[:, 1:][:, :-1].softmax(1)),
    C("slice minus", lambda m, h, i, k: h[:, 1:] - h[:, :-1], gathers=("slice",)),
    C(
        "slice same",
        lambda m, h, i, k: h[:, 2:] * h.sin()[:, 2:] + m.positions[:, : h.shape[1] - 2],
    ),
    C(
        "slice flat",
        lambda m, h, i, k: (
            m.head(h[:, 1:]).flatten(0, 1) / (1 + m.positions[0, :2, :V].sum(0))
        ).sum(0),
    ),
    C("slice matmul", lambda m, h, i, k: h[:, 1:].transpose(1, 2) @ h[:, 1:].cos()),
    C(
        "slice nan",
        lambda m, h, i, k: (h[:, :-1] - h[:, -1:].detach()).norm(dim=-1).log(),
        gathers=("slice",),
    ),
    C(
        "ce shifted none",
        lambda m, h, i, k: (
            F.cross_entropy(
                m.head(h)[:, :-1].flatten(0, 1),
                parts.targets(i)[:, 1:].flatten(),
                reduction="none",
            )
            * k[:, 1:].flatten()
        ).sum(),
    ),
    C(
        "ce shifted transposed",
        lambda m, h, i, k: F.cross_entropy(
            m.head(h)[:, :-1].transpose(1, 2), parts.targets(i)[:, 1:]
        ),
    ),
    C(
        "gather logp shifted",
        lambda m, h, i, k: (
            -m.head(h)[:, :-1]
            .log_softmax(-1)
            .gather(-1, parts.targets(i)[:, 1:, None])
            .squeeze(-1)
            .mean()
        ),
    ),
    C(
        "slice then attend",
        lambda m, h, i, k: m.again(h[:, 1:]),
        gathers=("slice",),
        rings=2,
    ),
    C("slice stride", lambda m, h, i, k: h[:, ::2].sin(), gathers=("slice",)),
    C("narrow", lambda m, h, i, k: h.narrow(1, 2, 5).sin(), gathers=("narrow",)),
    C(
        "roll",
        lambda m, h, i, k: m.again(torch.roll(h, 3, 1)),
        gathers=("roll",),
        rings=2,
    ),
    C("pad shift", parts.token_shift, gathers=("pad",), rings=2),
    C(
        "cat shift",
        parts.shift_cat,
        gathers=(
            "cat",
            "slice",
        ),
        rings=2,
    ),
    C(
        "pad then attend",
        lambda m, h, i, k: m.again(F.pad(h, (0, 0, 2, 1))),
        gathers=("pad",),
        rings=2,
    ),
    C(
        "cat cls",
        lambda m, h, i, k: m.again(torch.cat([m.cls.expand(B, 1, E), h], 1))[:, 0],
        gathers=("cat",),
        rings=2,
    ),
    C(
        "cat cls tokens",
        lambda m, h, i, k: m.again(torch.cat([m.cls.expand(B, 1, E), h], 1))[:, 1:],
        gathers=("cat",),
        rings=2,
    ),
    C(
        "cat two",
        lambda m, h, i, k: m.again(torch.cat([h, h.sin()], 1)),
        gathers=("cat",),
        rings=2,
    ),
    C("flip", lambda m, h, i, k: m.again(h.flip(1)), gathers=("flip",), rings=2),
    C("cumsum", lambda m, h, i, k: m.again(h.cumsum(1)), gathers=("cumsum",), rings=2),
    C("diff", lambda m, h, i, k: h.diff(dim=1).sin(), gathers=("diff",)),
    C("split", parts.split_prefix, gathers=("split_with_sizes",)),
    C(
        "chunk",
        lambda m, h, i, k: torch.cat([t.sin() for t in h.chunk(3, 1)], 1),
        gathers=("chunk",),
    ),
    C("unbind", parts.unbind, gathers=("unbind",)),
    C("conv", parts.conv("conv"), gathers=("conv1d",)),
    C(
        "depthwise conv",
        lambda m, h, i, k: m.depthwise(h.transpose(1, 2))[..., :-3].transpose(1, 2),
        gathers=("conv1d",),
    ),
    C("strided conv", parts.conv("strided"), gathers=("conv1d",)),
    C(
        "avg_pool",
        lambda m, h, i, k: F.avg_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
        gathers=("avg_pool1d",),
    ),
    C(
        "max_pool",
        lambda m, h, i, k: F.max_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
        gathers=("max_pool1d",),
    ),
    C("unfold", lambda m, h, i, k: h.unfold(1, 3, 1).sum(-1), gathers=("unfold",)),
    C(
        "repeat_interleave",
        lambda m, h, i, k: h.repeat_interleave(2, 1),
        gathers=("repeat_interleave",),
    ),
    C("repeat", lambda m, h, i, k: h.repeat(1, 2, 1), gathers=("repeat",)),
    # reductions
    C("mean", lambda m, h, i, k: h.mean(1)),
    C("sum keepdim", lambda m, h, i, k: h - h.sum(1, keepdim=True)),
    C("max", lambda m, h, i, k: h.max(1).values),
    C("max indices", lambda m, h, i, k: h.max(1).indices.double() + h.sum()),
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
    C("argmax", lambda m, h, i, k: h.argmax(1).double() + h.sum()),
    C("prod", lambda m, h, i, k: h.prod(1), gathers=("prod",)),
    C("count_nonzero", lambda m, h, i, k: (h > 0).sum(1) * h.sum()),
    C("first token", lambda m, h, i, k: h[:, 0]),
    C("last token", lambda m, h, i, k: h[:, -1]),
    C("last by index", parts.last_token),
    C("masked mean", parts.masked_pool),
    C(
        "gather S",
        lambda m, h, i, k: h.gather(1, (i % 7)[:, :4, None].expand(-1, -1, E)),
    ),
    C("index_select", lambda m, h, i, k: h.index_select(1, torch.tensor([3, 1, 5]))),
    C("index list", lambda m, h, i, k: h[:, [3, 1, 5]]),
    C("index mask", lambda m, h, i, k: torch.where(k[..., None], h, m.cls)),
    C("topk S", lambda m, h, i, k: h.topk(2, 1).values, gathers=("topk",)),
    C("linear attention", parts.linear_attention),
    C("pool attention", parts.pool_attn),
    C("xcit", parts.xcit),
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
    C("squeeze excite", parts.se, rings=2),
    C(
        "adaptive pool",
        lambda m, h, i, k: F.adaptive_avg_pool1d(h.transpose(1, 2), 1).flatten(1),
        gathers=("adaptive_avg_pool1d",),
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
    C("sinusoidal", parts.sin_pos, rings=2),
    C("rotary", parts.rotary, rings=2),
]
