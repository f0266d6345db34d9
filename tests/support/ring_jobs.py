"""Patterns run through the ring op on gloo ranks, and the bytes that they send."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

import ringcompile.lowering  # noqa: F401
from ringcompile import ops
from ringcompile.ir.attention import RankPlan
from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask, causal
from ringcompile.ir.schedule import Schedule
from ringcompile.ir.text import format_plan
from ringcompile.patterns import AttentionSpec, Pattern
from ringcompile.plan.stages import build_schedule
from support.ranks import RankPool


@dataclass(frozen=True)
class Job:
    """One attention, forward and backward.

    Attributes:
        pattern: the pattern.
        tensors: q ``(B, H, S, D)``, k, v, and the gradient of the output.
        layout: name of a layout.
        is_causal: whether the user's mask is causal.
        kernel: ``auto`` or ``math``.
    """

    pattern: Pattern
    tensors: tuple[Tensor, ...]
    layout: str = "contiguous"
    is_causal: bool = True
    kernel: str = "auto"

    @property
    def length(self) -> int:
        """Tokens S."""
        return self.tensors[0].shape[2]

    def schedule(self, cp_size: int) -> Schedule:
        """What all ranks do."""
        q, k = self.tensors[:2]
        mask = Mask(causal()) if self.is_causal else Mask()
        spec = AttentionSpec(q.shape[1], k.shape[1], self.length, self.is_causal)
        parts = self.pattern.build_parts(mask, spec)
        return build_schedule(parts, Layout(self.layout, cp_size), self.length)


@dataclass(frozen=True)
class Result:
    """What the ranks made of a job.

    Attributes:
        out: in the user's order, as q.
        grads: dq, dk and dv.
        sent: bytes that each rank sent, forward and backward.
    """

    out: Tensor
    grads: tuple[Tensor, ...]
    sent: tuple[tuple[int, int], ...]


def make_tensors(
    heads: tuple[int, int], S: int, *, B: int = 1, D: int = 4, seed: int = 0
) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, float32; v has ``D + 1`` features."""
    random = torch.Generator().manual_seed(seed)
    (H, G), E = heads, D + 1
    return tuple(
        torch.randn(B, n, S, d, generator=random)
        for n, d in ((H, D), (G, D), (G, E), (H, E))
    )


def run_jobs(ranks: RankPool, cp_size: int, jobs: Sequence[Job]) -> list[Result]:
    """Run jobs on ``cp_size`` ranks."""
    by_rank = ranks.run(_run_own, tuple(jobs), world_size=cp_size)
    results = []
    for job, *shards in zip(jobs, *by_rank, strict=True):
        layout = Layout(job.layout, cp_size)
        order = [p for p in layout.permutation(job.length) if p < job.length]
        where = torch.tensor(order).argsort()
        out, *grads = (
            torch.cat(xs, 2)[:, :, where]
            for xs in zip(*(s[0] for s in shards), strict=True)
        )
        results.append(Result(out, tuple(grads), tuple(s[1] for s in shards)))
    return results


def _run_own(
    group: ProcessGroup, rank: int, jobs: tuple[Job, ...]
) -> list[tuple[tuple[Tensor, ...], tuple[int, int]]]:
    return [_run(group, rank, job) for job in jobs]


def _run(
    group: ProcessGroup, rank: int, job: Job
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    schedule = job.schedule(group.size())
    plan = RankPlan(
        index=0,
        name="test",
        rank=rank,
        group_name=group.group_name,
        scale=job.tensors[0].shape[-1] ** -0.5,
        timeout_s=60.0,
        schedule=schedule,
        sources="",
        kernel=job.kernel,
    )
    at = torch.tensor(schedule.layout.positions(rank, job.length))
    is_real = at < job.length
    *qkv, grad = (x[:, :, at.clamp(max=job.length - 1)] for x in job.tensors)
    inputs = [x.requires_grad_() for x in qkv]
    with _counting() as sent:
        out = ops.RING_ATTENTION(*inputs, [], [], plan=format_plan(plan))
        forward = sum(sent)
        out.backward(grad * is_real[:, None])
    found = (out.detach(), *(x.grad for x in inputs))
    return tuple(x[:, :, is_real] for x in found), (forward, sum(sent) - forward)


@contextmanager
def _counting() -> Iterator[list[int]]:
    """The bytes of each tensor that is handed to the transport to be sent."""
    sent: list[int] = []
    start = dist.batch_isend_irecv

    def counting(requests: list[dist.P2POp]) -> Any:  # noqa: ANN401
        sent.extend(r.tensor.nbytes for r in requests if r.op is dist.isend)
        return start(requests)

    with patch.object(dist, "batch_isend_irecv", counting):
        yield sent
