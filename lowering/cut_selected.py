"""Kernel calls over selected rows: dense ones wherever whole segments allow it.

Compact rows of a segment, the same number for each head, are a dense attention of their
own, and equal neighbours one batched call. Invariant: a pair that counts is in exactly
one call; what can't be told apart in few calls is one masked call over all rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import B, causal, chunked, conjuncts, has_captures
from ringcompile.ir.schedule import Kernel, Selection
from ringcompile.ir.text import parse_mask
from ringcompile.lowering.calls import Call, join_calls, rows

_MOST_CALLS = 16
_ABSENT = -1


@dataclass(frozen=True, slots=True)
class Compact:
    """Global positions of compact rows.

    Attributes:
        q: ``(H, n)`` tuples, those of fewer rows filled up with -1.
        kv: ``(G, m)``, likewise.
    """

    q: tuple[tuple[int, ...], ...]
    kv: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=1024)
def cut_selected(mask: str, selection: Selection, at: Compact) -> tuple[Call, ...]:
    """Cut a tile of selected rows into calls.

    Args:
        mask: which pairs count, as text.
        selection: the rows that take part.
        at: where they are.
    """
    q, kv = (torch.tensor(rows) for rows in (at.q, at.kv))
    everything = Call(rows(0, q.shape[1]), rows(0, kv.shape[1]), Kernel.MASKED)
    heads = _find_heads(q, kv, selection)
    if heads is None:
        return (everything,)
    first, stop = heads
    shared = q.shape[0] // kv.shape[0]
    q, kv = q[first:stop], kv[first // shared : stop // shared]
    kv = kv.repeat_interleave(shared, 0)
    is_causal = _read_mask(parse_mask(mask).keeps, selection, q, kv, first)
    q_runs, kv_runs = _find_runs(selection, q), _find_runs(selection, kv)
    if is_causal is None or q_runs is None or kv_runs is None:
        return (everything,)
    calls = join_calls(list(_cut_runs(q_runs, kv_runs, q, kv, is_causal=is_causal)))
    if len(calls) > _MOST_CALLS or any(c.kernel is Kernel.MASKED for c in calls):
        return (everything,)
    whole = heads == (0, len(at.q))
    return tuple(replace(c, heads=None if whole else heads) for c in calls)


def _find_heads(q: Tensor, kv: Tensor, selection: Selection) -> tuple[int, int] | None:
    """The query heads that have rows; None if they are no run with rows alike."""
    has_rows = (q != _ABSENT).any(1)
    active = has_rows.nonzero()[:, 0].tolist()
    if not active or selection.has_mixed_groups:
        return None
    first, stop = active[0], active[-1] + 1
    shared = q.shape[0] // kv.shape[0]
    is_run = len(active) == stop - first and first % shared == stop % shared == 0
    if not is_run or (q[first:stop] == _ABSENT).any():
        return None
    if (kv[first // shared : stop // shared] == _ABSENT).any():
        return None
    return first, stop


def _read_mask(
    keeps: Boolean, selection: Selection, q: Tensor, kv: Tensor, first: int
) -> bool | None:
    """Whether pairs of one segment count if causal, or always; None: neither."""
    heads = torch.arange(first, first + len(q))[:, None]
    at_q, at_kv = ((torch.zeros_like(rows), heads, rows, rows) for rows in (q, kv))
    rest = []
    for atom in conjuncts(keeps):
        if has_captures(atom) or B in atom.free_symbols:
            return None
        names = {s.name for s in atom.free_symbols}
        if selection.start == 0 and atom == chunked(selection.segment):
            continue
        if names <= {"q", "h"} and bool(evaluate(atom, at_q).all()):
            continue
        if names <= {"k", "h"} and bool(evaluate(atom, at_kv).all()):
            continue
        rest.append(atom)
    return {(): False, (causal(),): True}.get(tuple(rest))


_Runs = dict[int, tuple[int, int]]


def _find_runs(selection: Selection, rows: Tensor) -> _Runs | None:
    """Where each segment's rows are; None if heads differ or a segment comes twice."""
    segments = selection.segments_of(rows)
    if not bool((segments == segments[0]).all()):
        return None
    numbers, counts = torch.unique_consecutive(segments[0], return_counts=True)
    stops = counts.cumsum(0).tolist()
    runs = {
        n: (stop - count, stop)
        for n, stop, count in zip(numbers.tolist(), stops, counts.tolist(), strict=True)
    }
    return runs if len(runs) == len(numbers) else None


def _cut_runs(
    q_runs: _Runs, kv_runs: _Runs, q: Tensor, kv: Tensor, *, is_causal: bool
) -> Iterable[Call]:
    """The call of each segment that both have rows of."""
    for number, at in q_runs.items():
        there = kv_runs.get(number)
        if there is None:
            continue
        positions = q[:, slice(*at)], kv[:, slice(*there)]
        kernel = _compare(*positions) if is_causal else Kernel.FULL
        if kernel is not None:
            yield Call(rows(*at), rows(*there), kernel)


def _compare(q: Tensor, kv: Tensor) -> Kernel | None:
    """The kernel of a causal mask over rows at these positions; None: no pair."""
    if bool((kv.amax(1) <= q.amin(1)).all()):
        return Kernel.FULL
    if bool((kv.amin(1) > q.amax(1)).all()):
        return None
    is_square = q.shape[1] == kv.shape[1] and bool(
        (kv <= q).all() and (q[:, :-1] < kv[:, 1:]).all()
    )
    return Kernel.CAUSAL if is_square else Kernel.MASKED
