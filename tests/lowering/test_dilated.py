"""Dilated attention on gloo ranks: values, gradients, bits and bytes."""

import pytest
import torch
from support.dilated_cases import UNEVEN
from support.pattern_cases import CASES, PatternCase
from support.ranks import RankPool
from support.ring_jobs import Job, Result, make_tensors, run_jobs
from support.tolerances import assert_gradients_equal, assert_output_equal

from ringcompile.plan.traffic import (
    BATCH,
    HEAD_SIZE,
    ITEM_BYTES,
    KV_HEADS,
    VALUE_SIZE,
    bytes_per_rank,
)

S = 43
DILATED = (
    "longnet paper",
    "longnet detached",
    "grouped",
    "consecutive",
    "local and divided",
)


def check_values(case: PatternCase, job: Job, result: Result) -> None:
    inputs = [x.double().requires_grad_() for x in job.tensors[:3]]
    want = case.attend(*inputs, is_causal=job.is_causal)
    grads = torch.autograd.grad(want, inputs, job.tensors[3].double())
    assert_output_equal(result.out, want)
    names = ("dq", "dk", "dv")
    assert_gradients_equal(
        dict(zip(names, result.grads, strict=True)),
        dict(zip(names, grads, strict=True)),
    )


def check_bytes(job: Job, result: Result) -> None:
    (B, _, _, D), (_, G, _, E) = (x.shape for x in (job.tensors[0], job.tensors[2]))
    sizes = {BATCH: B, KV_HEADS: G, HEAD_SIZE: D, VALUE_SIZE: E, ITEM_BYTES: 4}
    traffic = bytes_per_rank(job.schedule(len(result.sent)))
    assert result.sent == tuple(t.resolve(sizes) for t in traffic)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_values_gradients_and_bytes(ranks: RankPool, cp_size: int) -> None:
    cases = [(u.case, u.heads, u.length, u.is_causal) for u in UNEVEN.values()]
    cases += [(CASES[name], (4, 2), S, True) for name in DILATED]
    layouts = ("contiguous", "zigzag", "striped")
    jobs = [
        Job(case.pattern, make_tensors(heads, length), layouts[n % 3], is_causal)
        for n, (case, heads, length, is_causal) in enumerate(cases)
    ]
    results = run_jobs(ranks, cp_size, jobs)
    for (case, *_), job, result in zip(cases, jobs, results, strict=True):
        check_values(case, job, result)
        check_bytes(job, result)
    assert any(forward for r in results for forward, _ in r.sent)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_kernels_with_a_mask_give_the_same(ranks: RankPool, cp_size: int) -> None:
    """They take whole rows of all heads, where dense ones take runs of some."""
    names = ("grouped", "longnet paper")
    tensors = make_tensors((4, 4), 48)
    jobs = [Job(CASES[name].pattern, tensors, kernel="math") for name in names]
    for name, job, result in zip(
        names, jobs, run_jobs(ranks, cp_size, jobs), strict=True
    ):
        check_values(CASES[name], job, result)


def test_values_of_one_give_one(ranks: RankPool) -> None:
    jobs = []
    for name in DILATED:
        q, k, v, grad = make_tensors((4, 2), S)
        jobs.append(Job(CASES[name].pattern, (q, k, torch.ones_like(v), grad)))
    for name, result in zip(DILATED, run_jobs(ranks, 2, jobs), strict=True):
        case = CASES[name]
        is_covered = case.counts(4, 2, S).tril().any(-1)
        covered = result.out[0][is_covered] * case.divisor
        assert (covered - 1).abs().max() <= 4 * torch.finfo(torch.float32).eps, name
        assert not result.out[0][~is_covered].any(), name
        assert bool(is_covered.any()), name


def test_a_token_changes_what_sees_it_and_nothing_before(ranks: RankPool) -> None:
    at = 24  # of rank 1, as its first tokens; 2B and 2C have segments around it
    jobs = []
    for name in DILATED:
        q, k, v, grad = make_tensors((4, 2), S)
        jobs.append(Job(CASES[name].pattern, (q, k, v, grad)))
        k, v = k.clone(), v.clone()
        k[:, :, at] += 1
        v[:, :, at] += 1
        jobs.append(Job(CASES[name].pattern, (q, k, v, grad)))
    results = run_jobs(ranks, 2, jobs)
    for name, before, after in zip(DILATED, results[::2], results[1::2], strict=True):
        changed = (before.out != after.out).any(-1)[0]
        assert torch.equal(changed, CASES[name].counts(4, 2, S).tril()[:, :, at] > 0)
        assert not changed[:, :at].any()
        assert changed.any()


def test_a_batch_of_two_is_two_batches(ranks: RankPool) -> None:
    jobs = []
    for name in DILATED:
        both = make_tensors((4, 2), S, B=2)
        jobs.append(Job(CASES[name].pattern, both))
        jobs += [
            Job(CASES[name].pattern, tuple(x[b : b + 1] for x in both)) for b in (0, 1)
        ]
    results = run_jobs(ranks, 2, jobs)
    for n in range(len(DILATED)):
        of_two, *of_one = ((r.out, *r.grads) for r in results[3 * n : 3 * n + 3])
        for whole, *parts in zip(of_two, *of_one, strict=True):
            # Not in bits: for another batch size MKL sums in another order.
            rounding = 4 * torch.finfo(whole.dtype).eps * whole.abs().max()
            assert (whole - torch.cat(parts)).abs().max() <= rounding
