"""What a query with no key gives: the user's spelling decides; padding gives some V.

Invariant: rows that have a key are untouched, in value and gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringcompile import ops
from ringcompile.ir.attention import RankPlan
from ringcompile.ir.layout import Side
from ringcompile.ir.mask import EmptyRow
from ringcompile.ir.reshard import ReshardSpec, format_spec
from ringcompile.lowering.orders import find_positions
from ringcompile.lowering.reshard import reduce_partial, spread


def fill_empty_rows(
    out: Tensor,
    lse: Tensor | None,
    qkv: tuple[Tensor, Tensor, Tensor],
    biases: Sequence[Tensor] = (),
    *,
    plan: RankPlan,
) -> Tensor:
    """Give rows whose lse is -inf what the user's mask means for them.

    Args:
        out: merged output, ``(B, H, T, E)``.
        lse: merged lse, ``(B, H, T)``; None where each row has a key, if only a sink.
        qkv: this rank's rows of q ``(B, H, T, D)``, k and v.
        biases: of scores.
        plan: the attention's plan.

    Returns:
        ``out`` with such rows replaced.
    """
    if lse is not None:
        is_empty = (lse == -torch.inf)[..., None]
        out = _fill_empty(out, is_empty, qkv, biases, plan)
    return _fill_pads(out, qkv[2], plan)


def _fill_empty(
    out: Tensor,
    is_empty: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    biases: Sequence[Tensor],
    plan: RankPlan,
) -> Tensor:
    mask = plan.schedule.parts[0].mask
    if mask.empty_row is EmptyRow.ZERO:
        return out
    if mask.empty_row is EmptyRow.NAN:
        return torch.where(is_empty, torch.nan, out)
    mean = _mean_of_all(*qkv, biases, plan)
    return torch.where(is_empty, mean.to(out.dtype), out)


class _Unknown(torch.autograd.Function):
    """Zeros, whose gradient by what scores are made of is NaN where it isn't 0.

    For scores of rows without a key, where a bias or a softcap changes them. Their
    gradient would take all keys and values on each rank: the moment that
    ``_mean_of_all`` sums up serves products alone. Mostly there is none to pass on, as
    nothing reads what such a row gives.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        *scored: Tensor,
    ) -> Tensor:
        ctx.like = [(x.shape, x.dtype) for x in scored]
        return torch.zeros_like(scored[0])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        unknown = torch.where((grad != 0).any(), torch.nan, 0.0)
        return tuple(
            unknown.to(dtype).expand(shape) if needed else None
            for needed, (shape, dtype) in zip(
                ctx.needs_input_grad, ctx.like, strict=True
            )
        )


def _fill_pads(out: Tensor, v: Tensor, plan: RankPlan) -> Tensor:
    """Let each row of padding attend to one key alone, without a gradient.

    To itself, or where keys are another sequence to the first that is here. Zeros would
    be NaN behind a norm without eps, and its backward would carry that NaN, times a
    tangent of 0, into the weights before it.
    """
    schedule = plan.schedule
    if not schedule.q_side.has_pads:
        return out
    own = v if schedule.keys is None else v[:, :, :1]
    own = own.detach().repeat_interleave(out.shape[1] // v.shape[1], 1)
    return torch.where(_is_real(out, plan, schedule.q_side), out, own)


def _is_real(x: Tensor, plan: RankPlan, side: Side) -> Tensor:
    """Which rows of a shard are no padding, ``(T, 1)``."""
    layout, length = side.layout, side.length
    chunk = x.shape[2] // layout.chunks_per_rank
    positions = find_positions(layout, plan.rank, chunk, length=length, device=x.device)
    length = chunk * layout.num_chunks if length is None else length
    return (positions < length)[:, None]


def _mean_of_all(
    q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor], plan: RankPlan
) -> Tensor:
    """Softmax over scores that are all ``finfo.min``: uniform over all S keys.

    Where the mask was put in the scores' place they get no gradient. Where it was added
    (``MEAN_ALL``) theirs still flows: with weights 1/S, the derivative of a row by its
    scores is ``(V_j - mean) / S``, so by q it is ``scale / S * K^T (V - mean)``.
    ``x - x.detach()`` adds that gradient to the mean.

    Returns:
        ``(B, H, 1 or T, E)``.
    """
    schedule = plan.schedule
    spec = format_spec(
        ReshardSpec(
            schedule.layout, plan.rank, plan.group_name, plan.timeout_s, plan.sources
        )
    )
    dtype = ops.accumulation_dtype(q.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    is_real = _is_real(v, plan, schedule.kv_side)
    length = schedule.kv_side.length
    if length is None:
        length = v.shape[2] * schedule.cp_size
    total = reduce_partial(torch.where(is_real, v, 0.0).sum(2, keepdim=True), spec=spec)
    (mean,) = spread([total / length], spec=spec)
    shared = q.shape[1] // k.shape[1]
    means = mean.repeat_interleave(shared, 1)
    if schedule.parts[0].mask.empty_row is not EmptyRow.MEAN_ALL:
        return means
    if plan.changes_scores:
        total = k.sum((2, 3), keepdim=True)  # by which all ranks' keys get their NaN
        (keys,) = spread([reduce_partial(total, spec=spec)], spec=spec)
        scored = q.sum(3, keepdim=True) + keys.sum(1, keepdim=True)
        nothing: Tensor = _Unknown.apply(scored, *biases)  # type: ignore[no-untyped-call]
        return means + nothing
    spans = torch.where(is_real, v - mean, 0.0).detach()
    (moment,) = spread([reduce_partial(k.mT @ spans, spec=spec)], spec=spec)
    x = plan.scale * (q @ moment.repeat_interleave(shared, 1))
    return means + (x - x.detach()) / length
