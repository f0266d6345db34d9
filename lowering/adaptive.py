"""Blocks chosen by what Q and K hold, as a capture of the mask.

Invariant: every rank makes the same choice for the blocks whose queries it holds, as it
chooses by sums that are equal on all ranks; a choice has no gradient and is saved, so
that nothing of it runs again in backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.attention import RankPlan
from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.reshard import ReshardSpec, format_spec
from ringcompile.lowering.hops import keep
from ringcompile.lowering.orders import find_positions
from ringcompile.lowering.program import read_plan
from ringcompile.lowering.reshard import reduce_partial, spread
from ringcompile.lowering.rows import Size

_ROWS_AT_ONCE = 64


def choose_blocks(
    q: Tensor, k: Tensor, captures: Sequence[Tensor], *, plan: str
) -> tuple[list[Tensor], Tensor | None]:
    """Add the choice of blocks to the captures, if the plan's mask reads one.

    Args:
        q: own rows, ``(B, H, T, D)``.
        k: own rows, ``(B, G, T, D)``.
        captures: the user's; behind them, of a learned choice, scores
            ``(B, H, num_blocks, num_blocks)`` and which blocks have a key.
        plan: text of the attention's plan.

    Returns:
        All captures, and of a learned choice what is added to the scores of the pairs
        of a block, as far as gradients go; it changes no value.
    """
    record = read_plan(plan)
    choice = record.schedule.parts[0].mask.choice
    if choice is None:
        return list(captures), None
    with torch.no_grad():
        if choice.is_learned:
            scores, has_key = captures[-2:]
        else:
            q_means, k_means, has_key = sum_up_blocks(q, k, captures, plan=plan)
            scores = record.scale * (q_means @ k_means.mT)
        chosen = ops.CHOOSE_BLOCKS(scores, has_key, choice.keep, choice.is_causal)
        known = [*captures, keep(chosen, [])]
    if not choice.is_learned:
        return known, None
    is_seen = _find_candidates(has_key, choice.is_causal) | _find_own(has_key)
    shares = captures[-2].masked_fill(~is_seen, -torch.inf).log_softmax(-1)
    (shares,) = spread([shares], spec=_format_spec(record))
    return known, shares


def sum_up_blocks(
    q: Tensor, k: Tensor, captures: Sequence[Tensor], *, plan: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What a block's queries and keys are like, by the mean of the tokens that count.

    Args:
        q: own rows, ``(B, H, T, D)``.
        k: own rows, ``(B, G, T, D)``.
        captures: the user's.
        plan: text of the attention's plan.

    Returns:
        Of all blocks, equal on all ranks and without a gradient: means of Q and K,
        ``(B, H, num_blocks, D)``, and whether a block has a key, ``(B, 1, 1, n)``.
    """
    record = read_plan(plan)
    schedule, device = record.schedule, q.device
    choice, layout = schedule.parts[0].mask.choice, schedule.layout
    assert choice is not None, "a mask that reads a choice"
    B, H = q.shape[:2]
    chunk = q.shape[2] // layout.chunks_per_rank
    length = schedule.length
    if length is None:
        length = chunk * layout.num_chunks
    at = find_positions(
        layout, record.rank, chunk, length=schedule.length, device=device
    )
    is_real = at < length
    batch = torch.arange(B, device=device)[:, None, None]
    index = (batch, torch.zeros_like(batch), at, at)  # as a predicate's b, h, q, k
    is_key = evaluate(choice.visible, index, captures) & is_real
    is_query = is_real & (at % choice.block == 0) if choice.is_causal else is_real
    num_blocks = (length + choice.block - 1) // choice.block
    block_of = at.clamp(max=length - 1) // choice.block
    with torch.no_grad():
        sums = torch.cat(
            [
                _add_up(q, is_query.expand(B, 1, -1), block_of, num_blocks),
                _add_up(k, is_key.expand(B, 1, -1), block_of, num_blocks),
            ],
            1,
        )
        sums = reduce_partial(sums, spec=_format_spec(record))
        means = sums[..., :-1] / sums[..., -1:].clamp(min=1)
        k_means = means[:, H:].repeat_interleave(H // k.shape[1], 1)
        return means[:, :H], k_means, sums[:, H : H + 1, :, -1][:, :, None] > 0


def _add_up(x: Tensor, counts: Tensor, block_of: Tensor, num_blocks: Size) -> Tensor:
    """Sums of the rows that count ``(B, 1, T)``, by block, and how many they are."""
    dtype = ops.accumulation_dtype(x.dtype)
    counts = counts[..., None]
    ones = counts.to(dtype).expand(*x.shape[:3], 1)
    rows = torch.cat([torch.where(counts, x.to(dtype), 0.0), ones], -1)
    sums = rows.new_zeros((*x.shape[:2], num_blocks, x.shape[3] + 1))
    return sums.index_add(2, block_of, rows)


def _find_own(has_key: Tensor) -> Tensor:
    """Whether a query block ``i`` and a key block ``j`` are one, ``(i, j)``."""
    return torch.eye(has_key.shape[-1], dtype=torch.bool, device=has_key.device)


def _find_candidates(has_key: Tensor, is_causal: bool) -> Tensor:
    """Which key blocks may be chosen beside the own one, ``(B, 1, i, j)``."""
    is_other = ~_find_own(has_key)
    return has_key & (is_other.tril() if is_causal else is_other)


def _choose_blocks(
    scores: Tensor, has_key: Tensor, count: int, is_causal: bool
) -> Tensor:
    is_candidate = _find_candidates(has_key, is_causal)
    chosen = []
    for start in range(0, scores.shape[2], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        found = scores[:, :, rows].masked_fill(~is_candidate[:, :, rows], -torch.inf)
        found = found.masked_fill(_find_own(has_key)[rows], torch.inf)
        best, at = found.sort(dim=-1, descending=True, stable=True)
        best, at = best[..., :count], at[..., :count]
        chosen.append(at.masked_fill(best == -torch.inf, -1))
    lists = torch.cat(chosen, 2)
    return torch.nn.functional.pad(lists, (0, count - lists.shape[-1]), value=-1)


def _choice_shape(
    scores: Tensor, _has_key: Tensor, count: int, _is_causal: bool
) -> Tensor:
    return scores.new_empty((*scores.shape[:3], count), dtype=torch.int64)


def _format_spec(plan: RankPlan) -> str:
    return format_spec(
        ReshardSpec(
            *(plan.schedule.layout, plan.rank, plan.group_name),
            *(plan.timeout_s, plan.sources),
        )
    )


ops.LIBRARY.impl("sum_up_blocks", sum_up_blocks, "CompositeImplicitAutograd")
ops.LIBRARY.impl("choose_blocks", _choose_blocks, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ringcompile::choose_blocks", _choice_shape, lib=ops.LIBRARY
)
