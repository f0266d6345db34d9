"""One case for each op class: losses, norms, routing, and ops of each token alone."""

import math

import torch
import torch.nn.functional as F

from support import rule_parts as parts
from support.rule_models import B, E, RuleCase, V

C = RuleCase
TOKEN_CASES = [
    # losses
    C("ce mean", parts.ce()),
    C("ce sum", parts.ce(reduction="sum")),
    C("ce none", parts.ce(reduction="none")),
    C("ce smooth", parts.ce(label_smoothing=0.1)),
    C("ce ignore", parts.ce(ignore_index=2)),
    C("ce smooth ignore", parts.ce(label_smoothing=0.1, ignore_index=2)),
    C("ce weights", parts.class_weights("mean")),
    C("ce weights sum", parts.class_weights("sum")),
    C("ce weights smooth", parts.class_weights("mean", label_smoothing=0.1)),
    C("ce per token", parts.ce_w),
    C("ce transposed", parts.ce_t()),
    C("ce transposed smooth none", parts.ce_t(label_smoothing=0.1, reduction="none")),
    C(
        "ce soft",
        lambda m, h, i, k: F.cross_entropy(
            m.head(h).flatten(0, 1), m.positions[0, :5, :V].softmax(-1)[i.flatten() % 5]
        ),
    ),
    C("ce shifted", parts.shifted),
    C("ce hf", parts.hf),
    C("ce chunked tokens", parts.chunked, gathers=("chunk",)),
    C("ce chunked S", parts.chunked_s, gathers=("chunk",)),
    C("z-loss", parts.zloss),
    C(
        "nll",
        lambda m, h, i, k: F.nll_loss(
            m.head(h).log_softmax(-1).flatten(0, 1), parts.targets(i).flatten()
        ),
    ),
    C(
        "nll transposed",
        lambda m, h, i, k: F.nll_loss(
            m.head(h).log_softmax(-1).transpose(1, 2), parts.targets(i), reduction="sum"
        ),
    ),
    C(
        "gather logp",
        lambda m, h, i, k: (
            -m.head(h)
            .log_softmax(-1)
            .gather(-1, parts.targets(i)[..., None])
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
    C("batch norm", parts.conv("batch_norm")),
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
    C("group norm", parts.conv("group_norm")),
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
    C("experts", parts.experts),
    C("router scatter", parts.router_scatter),
    C(
        "index_add",
        parts.index_add,
        gathers=(
            "index_add",
            "view_as",
        ),
    ),
    C("masked_scatter", parts.masked_scatter, gathers=("masked_scatter",), rings=2),
    C("index_put", parts.index_put),
    C("fill feature", parts.fill_in, rings=2),
    C("one_hot argmax", lambda m, h, i, k: F.one_hot(h.argmax(-1), E).to(h.dtype) * h),
    C("cumsum features", lambda m, h, i, k: h.cumsum(-1)),
    C(
        "scatter_add features",
        lambda m, h, i, k: torch.zeros_like(h).scatter_add(-1, h.argsort(-1), h),
    ),
    C("unknown", lambda m, h, i, k: torch.fft.fft(h, dim=1).real, gathers=("fft_fft",)),
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
        gathers=("bilinear",),
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
    C("sort S", lambda m, h, i, k: h.sort(1).values, gathers=("sort",)),
    C(
        "cdist",
        lambda m, h, i, k: torch.cdist(h, m.positions[:, :3].expand(B, -1, -1)),
        gathers=("cdist",),
    ),
    C(
        "interpolate",
        lambda m, h, i, k: F.interpolate(h.transpose(1, 2), scale_factor=2).transpose(
            1, 2
        ),
        gathers=("upsample_nearest1d",),
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
