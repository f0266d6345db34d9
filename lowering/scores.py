"""What changes scores beside products: biases as parts read them, and sinks.

Invariant: what a row's scores are is known on the rank of its query, so no rank asks
another for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.attention import Bias, RankPlan
from ringcompile.ir.evaluate import evaluate
from ringcompile.lowering.merge import merge
from ringcompile.lowering.orders import find_positions
from ringcompile.lowering.rows import RowSet, Size, Values


@dataclass(frozen=True, slots=True)
class PartBias:
    """A bias, of the queries that take part.

    Attributes:
        tensor: ``(B or 1, H or 1, n or 1, columns)``.
        traits: how it is added.
        is_learned: whether its gradient is wanted.
        is_spread: whether it was one for all heads, and is one for each now.
    """

    tensor: Tensor
    traits: Bias
    is_learned: bool = False
    is_spread: bool = False

    @property
    def has_column_per_key(self) -> bool:
        """Whether a column is one key's."""
        return not self.traits.is_relative and self.tensor.shape[3] != 1

    def take(self, rows: RowSet, num_heads: int, *, by_head: bool) -> "PartBias":
        """The bias of some queries.

        Args:
            rows: which, of the rank's.
            num_heads: H.
            by_head: whether positions of queries or keys may differ by head.
        """
        x, is_spread = self.tensor, False
        if by_head and x.shape[1] != num_heads:
            x, is_spread = x.expand(-1, num_heads, -1, -1), True
        x = rows.take(x) if self.traits.is_cut else x
        return replace(self, tensor=x, is_spread=is_spread)


def find_level(
    plan: RankPlan, biases: Sequence[Tensor], captures: Sequence[Tensor], rows: Size
) -> Tensor | None:
    """What is taken off all scores of a query: the largest bias of keys that it sees.

    A softmax does not change by it. Without it a query all of whose keys are hidden by
    a bias of ``finfo.min`` has an lse of ``finfo.min`` too, in which their number is
    lost; it still is where only biases without rows of queries hide them.

    Args:
        plan: says how biases are added, and which keys are seen.
        biases: the biases.
        captures: what masks read.
        rows: of queries on this rank, T.

    Returns:
        ``(B or 1, H or 1, T, 1)``; None if no bias has rows of queries.
    """
    cut = [x for x, bias in zip(biases, plan.biases, strict=True) if bias.is_cut]
    if not cut:
        return None
    dtype = ops.accumulation_dtype(cut[0].dtype)
    total = reduce(torch.add, (x.detach().to(dtype) for x in cut))
    if total.shape[3] > 1:
        seen = _find_seen(plan, total, captures, rows)
        total = torch.where(seen, total, -torch.inf)
    level = total.amax(3, keepdim=True)
    return torch.where(level.isfinite(), level, 0.0)


def _find_seen(
    plan: RankPlan, biases: Tensor, captures: Sequence[Tensor], rows: Size
) -> Tensor:
    """Which keys some part shows to a query; broadcasts to ``(B, H, T, S)``."""
    schedule, device = plan.schedule, biases.device
    side = schedule.q_side
    chunk = rows // side.layout.chunks_per_rank
    q_pos = find_positions(
        *(side.layout, plan.rank, chunk), length=side.length, device=device
    )
    b, h = (torch.arange(size, device=device) for size in biases.shape[:2])
    k_pos = torch.arange(biases.shape[3], device=device)
    at = (b.view(-1, 1, 1, 1), h.view(-1, 1, 1), q_pos.view(-1, 1), k_pos)
    seen = [evaluate(part.mask.keeps, at, captures) for part in schedule.parts]
    return reduce(torch.logical_or, seen)


def read_biases(
    plan: RankPlan,
    biases: Sequence[Tensor],
    level: Tensor | None,
    learned: Sequence[bool] = (),
) -> tuple[PartBias, ...]:
    """All that is added to capped scores.

    Args:
        plan: says how.
        biases: of all the rank's queries.
        level: what is taken off; None: nothing.
        learned: which of them want a gradient; none if it is left out.
    """
    learned = learned or [False] * len(biases)
    added = [PartBias(*each) for each in zip(biases, plan.biases, learned, strict=True)]
    if level is not None:
        added.append(PartBias(-level, Bias(is_cut=True)))
    return tuple(added)


# ---- sinks ---------------------------------------------------------------------------


def sink_scores(sinks: Tensor, level: Tensor | None, lse: Tensor) -> Tensor:
    """Scores of sinks ``(H,)`` beside the lse ``(B, H, T)`` of keys, in its shape."""
    scores = sinks.to(lse.dtype)[None, :, None]
    if level is not None:
        scores = scores - level[..., 0]
    return scores.expand_as(lse)


def add_sinks(out: Tensor, lse: Tensor, scores: Tensor) -> Values:
    """Out and lse with one more key for each head, whose value is 0."""
    return merge((out, lse), (torch.zeros_like(out), scores.to(lse.dtype)))


def sink_gradient(grad_out: Tensor, out: Tensor, lse: Tensor, scores: Tensor) -> Tensor:
    """Gradient of sinks, ``(H,)``, over this rank's rows.

    Args:
        grad_out: ``(B, H, T, E)``.
        out: with sinks, ``(B, H, T, E)``.
        lse: with sinks, ``(B, H, T)``.
        scores: of sinks, ``(B, H, T)``.
    """
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    return -(torch.exp(scores - lse) * delta).sum((0, 2))
