"""All ranks of a schedule in one process, in float64: what a ring would compute.

Each rank holds its shard only and reads what its tiles say arrives; forward and
backward are explicit formulas. Invariant: independent of the lowering, which tests hold
against the same reference.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import Side
from ringcompile.ir.schedule import Kernel, Part, Schedule, Selection, Step
from ringcompile.plan.selection import selected_rows


@dataclass(frozen=True, slots=True)
class Simulated:
    """Results over the whole sequence, float64.

    Attributes:
        out: ``(B, H, S, E)``, 0 in rows without a key.
        lse: ``(B, H, S)``, -inf in rows without a key.
        dq: ``(B, H, S, D)``.
        dk: ``(B, G, S, D)``.
        dv: ``(B, G, S, E)``.
    """

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def simulate(  # noqa: PLR0913 - one attention's tensors
    schedule: Schedule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grad_out: Tensor,
    captures: Sequence[Tensor] = (),
    scale: float | None = None,
) -> Simulated:
    """Run a schedule forward and backward.

    Args:
        schedule: what all ranks do.
        q: ``(B, H, S, D)``.
        k: ``(B, G, S, D)``, of as many keys as the schedule has.
        v: ``(B, G, S, E)``.
        grad_out: gradient of the output, ``(B, H, S, E)``.
        captures: what the masks read.
        scale: factor of ``<Q, K>``; None for ``D ** -0.5``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sides = schedule.q_side.at(q.shape[2]), schedule.kv_side.at(k.shape[2])
    run = _Run(schedule, *sides, captures, scale)
    qs, grads = (run.shard(x.double(), run.q_side) for x in (q, grad_out))
    ks, vs = (run.shard(x.double(), run.kv_side) for x in (k, v))
    mixing, heads = schedule.mixing, (q.shape[1], k.shape[1])
    grads = [x / mixing.divisor for x in grads]
    mixed, by_part = [_nothing(x, v.shape[3]) for x in qs], []
    for part in schedule.parts:
        own = [_nothing(x, v.shape[3]) for x in qs]
        for work in run.works(part, *heads):
            work.forward(run, (qs, ks, vs), own)
        mixed = [_merge(*pair) for pair in zip(mixed, own, strict=True)]
        by_part.append([out for out, _ in own])
    out, lse = map(list, zip(*mixed, strict=True))
    dq, dk, dv = ([torch.zeros_like(x) for x in xs] for xs in (qs, ks, vs))
    for part, own_out in zip(schedule.parts, by_part, strict=True):
        read = own_out if mixing.is_detached else out
        delta = [(g * o).sum(-1) for g, o in zip(grads, read, strict=True)]
        for work in run.works(part, *heads):
            work.backward(run, (qs, ks, vs, grads, lse, delta), (dq, dk, dv))
    out = [x / mixing.divisor for x in out]
    return Simulated(
        *(run.unshard(xs, run.q_side) for xs in (out, lse, dq)),
        *(run.unshard(xs, run.kv_side) for xs in (dk, dv)),
    )


_Result = tuple[Tensor, Tensor]
"""Out and lse of one rank's rows."""


def _nothing(q: Tensor, value_size: int) -> _Result:
    """What no key gives."""
    out = q.new_zeros((*q.shape[:3], value_size))
    return out, q.new_full(q.shape[:3], -torch.inf)


def _merge(old: _Result, new: _Result) -> _Result:
    """Out and lse over the keys of both."""
    total = torch.logaddexp(old[1], new[1])
    share, new_share = ((x[1] - _finite(total)).exp()[..., None] for x in (old, new))
    return old[0] * share + new[0] * new_share, total


@dataclass(frozen=True, slots=True)
class _Run:
    schedule: Schedule
    q_side: Side
    kv_side: Side
    captures: Sequence[Tensor]
    scale: float

    def shard(self, x: Tensor, side: Side) -> list[Tensor]:
        """Each rank's rows; a pad holds a copy of the last token."""
        last = _length(side) - 1
        ranks = range(self.schedule.cp_size)
        return [x[:, :, _positions(side, r).clamp(max=last)] for r in ranks]

    def unshard(self, shards: list[Tensor], side: Side) -> Tensor:
        """The whole sequence in the user's order, without padding."""
        where = torch.tensor(side.layout.inverse(_length(side)))
        return torch.cat(shards, 2)[:, :, where[: side.length]]

    def works(self, part: Part, num_heads: int, num_kv_heads: int) -> Iterator["_Work"]:
        """Every kernel call of a part on every rank, step after step."""
        for step in part.steps:
            for rank in range(self.schedule.cp_size):
                yield from self._works_of(part, step, rank, num_heads // num_kv_heads)

    def _works_of(
        self, part: Part, step: Step, rank: int, shared: int
    ) -> Iterator["_Work"]:
        owner = (rank - step.shift) % self.schedule.cp_size
        tile = step.tiles[rank]
        if not tile.needs:
            return
        sides = (self.q_side, self.kv_side)
        q_chunk, chunk = (s.layout.chunk_size(_length(s)) for s in sides)
        arrived = [run.resolve(chunk) for run in tile.needs]
        if part.selection is not None:
            yield from self._selected_works(part, part.selection, rank, owner, shared)
            return
        for piece in tile.pieces:
            q, kv = piece.q.resolve(q_chunk), piece.kv.resolve(chunk)
            assert any(a <= kv[0] < kv[1] <= b for a, b in arrived), (
                "reads what did not arrive"
            )
            rows = (torch.arange(*q), torch.arange(*kv))
            yield _Work(part, rank, owner, rows, piece.kernel, None, shared)

    def _selected_works(
        self, part: Part, selection: Selection, rank: int, owner: int, shared: int
    ) -> Iterator["_Work"]:
        """One call for each query head, on the rows that travelled for its KV head."""
        layout, length = self.schedule.layout, _length(self.q_side)
        at = layout.positions(rank, length)
        q_rows = selected_rows(selection, at, length=length)
        kv_rows = selected_rows(
            selection,
            layout.positions(owner, length),
            length=length,
            for_positions=at,
        )
        for head, rows in enumerate(q_rows):
            pair = (
                torch.tensor(rows).long(),
                torch.tensor(kv_rows[head // shared]).long(),
            )
            if len(pair[0]) and len(pair[1]):
                yield _Work(part, rank, owner, pair, Kernel.MASKED, head, shared)


def _length(side: Side) -> int:
    assert side.length is not None, "all lengths are known"
    return side.length


def _positions(side: Side, rank: int) -> Tensor:
    """Global positions of a rank's rows, padding included."""
    length = _length(side)
    chunk = side.layout.chunk_size(length)
    return side.layout.position_tensor(rank, chunk, length=length)


@dataclass(frozen=True, slots=True)
class _Work:
    """One kernel call.

    Attributes:
        part: whose mask counts.
        rank: who computes.
        owner: whose keys and values.
        rows: query rows of ``rank``, KV rows of ``owner``.
        kernel: which pairs count.
        head: the one query head; None for all.
        shared: query heads that share a KV head.
    """

    part: Part
    rank: int
    owner: int
    rows: tuple[Tensor, Tensor]
    kernel: Kernel
    head: int | None
    shared: int

    def forward(
        self,
        run: _Run,
        shards: tuple[list[Tensor], ...],
        results: list[_Result],
    ) -> None:
        """Merge this call's result into that of the rank."""
        q, k, v = shards
        scores = self._scores(run, q, k)
        new_lse = scores.logsumexp(-1)
        weights = (scores - _finite(new_lse)[..., None]).exp()
        at = self._at_q()
        new_out = weights @ self._values(v)
        out, lse = results[self.rank]
        out[at], lse[at] = _merge((out[at], lse[at]), (new_out, new_lse))

    def backward(
        self,
        run: _Run,
        saved: tuple[list[Tensor], ...],
        grads: tuple[list[Tensor], ...],
    ) -> None:
        """Add this call's share of dq, dk and dv.

        ``saved``: shards of q, k, v, the gradient, lse over all keys, and its product
        with the output whose weights pass gradients on.
        """
        q, k, v, grad, lse, delta = saved
        dq, dk, dv = grads
        at = self._at_q()
        grad_out = grad[self.rank][at]
        total = _finite(lse[self.rank][at])[..., None]
        weights = (self._scores(run, q, k) - total).exp()
        d_weights = grad_out @ self._values(v).mT
        d_scores = run.scale * weights * (d_weights - delta[self.rank][at][..., None])
        dq[self.rank][at] += d_scores @ self._values(k)
        self._send_home(dk, d_scores.mT @ q[self.rank][at])
        self._send_home(dv, weights.mT @ grad_out)

    def _heads(self, num_heads: int) -> Tensor:
        return (
            torch.arange(num_heads) if self.head is None else torch.tensor([self.head])
        )

    def _at_q(self) -> tuple[slice, Tensor | slice, Tensor]:
        """Index of the query rows in a shard ``(B, H, T, ...)``."""
        heads = slice(None) if self.head is None else slice(self.head, self.head + 1)
        return slice(None), heads, self.rows[0]

    def _values(self, kv: list[Tensor]) -> Tensor:
        """K or V of the owner for each query head of this call."""
        shard = kv[self.owner]
        heads = self._heads(shard.shape[1] * self.shared)
        return shard[:, heads // self.shared][:, :, self.rows[1]]

    def _send_home(self, into: list[Tensor], d_kv: Tensor) -> None:
        heads = self._heads(into[self.owner].shape[1] * self.shared) // self.shared
        full = torch.zeros_like(into[self.owner]).index_add(
            1, heads, _place(d_kv, self.rows[1], into[self.owner].shape[2])
        )
        into[self.owner] += full

    def _scores(self, run: _Run, q: list[Tensor], k: list[Tensor]) -> Tensor:
        """``(B, heads, n, m)``, -inf where a pair does not count."""
        scores = run.scale * (q[self.rank][self._at_q()] @ self._values(k).mT)
        if self.kernel is Kernel.FULL:
            return scores
        n, m = scores.shape[2:]
        if self.kernel is Kernel.CAUSAL:
            kept = torch.arange(n)[:, None] >= torch.arange(m)
        else:
            kept = self._kept(run, q[self.rank].shape[0], q[self.rank].shape[1])
        return scores.masked_fill(~kept, -torch.inf)

    def _kept(self, run: _Run, num_batches: int, num_heads: int) -> Tensor:
        q_at = _positions(run.q_side, self.rank)[self.rows[0]][:, None]
        k_at = _positions(run.kv_side, self.owner)[self.rows[1]]
        heads = self._heads(num_heads)[:, None, None]
        batches = torch.arange(num_batches)[:, None, None, None]
        kept = evaluate(
            self.part.mask.keeps, (batches, heads, q_at, k_at), run.captures
        )
        s = self.part.selection
        if s is not None and self.head is not None:
            kept = kept & (s.residues_of(k_at) == s.offsets[self.head])
            kept = kept & (s.segments_of(q_at) == s.segments_of(k_at))
        return kept


def _place(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """``values`` at ``rows`` of zeros, along the dim of rows."""
    full = values.new_zeros((*values.shape[:2], num_rows, values.shape[3]))
    return full.index_copy(2, rows, values)


def _finite(lse: Tensor) -> Tensor:
    """``lse`` with 0 for -inf: such a row has scores of -inf only, and weights of 0."""
    return torch.where(lse == -torch.inf, 0.0, lse)
