"""All ranks simulated from a schedule, against the dense reference; with gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import captures, layouts, masks
from torch import Tensor

from ringcompile import reference
from ringcompile.ir.layout import LAYOUTS, Layout
from ringcompile.ir.mask import Mask, causal, documents, key_padding, window
from ringcompile.ir.schedule import Schedule
from ringcompile.patterns import AttentionSpec, LocalWindow, LongNet
from ringcompile.plan.check import check_schedule
from ringcompile.plan.simulate import simulate
from ringcompile.plan.stages import build_schedule

B, H, G, D, E = 2, 4, 2, 4, 3
NAMES = ("out", "lse", "dq", "dk", "dv")
FOR_ANY_LENGTH = [name for name in LAYOUTS if Layout(name, 1).has_runs]


def tensors(length: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(length)
    return [
        torch.randn(B, n, length, d, generator=random, dtype=torch.float64)
        for n, d in ((H, D), (G, D), (G, E), (H, E))
    ]


def assert_simulates(
    schedule: Schedule,
    length: int,
    out: Tensor,
    inputs: list[Tensor],
    lse: Tensor | None,
) -> None:
    """``out`` is the reference's, of ``inputs`` q, k and v that require grad."""
    *qkv, grad = (x.detach() for x in tensors(length))
    got = simulate(schedule, *qkv, grad_out=grad, captures=captures(B, length))
    grads = torch.autograd.grad(out, inputs, grad)
    want = dict(zip(NAMES, (out, lse, *grads), strict=True))
    for name, value in want.items():
        if value is not None:
            error = (getattr(got, name) - value).nan_to_num(0.0).abs().max()
            assert error < 1e-12, name
    if lse is not None:
        assert torch.equal(got.lse.isneginf(), lse.isneginf())


def run(
    mask: Mask, layout: Layout, length: int, planned: int | None, stages: int | None
) -> None:
    schedule = build_schedule([(mask, None)], layout, planned, num_stages=stages)
    check_schedule(schedule)
    q, k, v, _ = tensors(length)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    reads = captures(B, length)
    out = reference.attention(*inputs, mask=mask, captures=reads)
    lse = reference.log_sum_exp(q, k, mask=mask, captures=reads)
    assert_simulates(schedule, length, out, inputs, lse)


@settings(deadline=None, max_examples=30)
@given(masks, layouts(16), st.integers(1, 40), st.sampled_from([None, 1, 2, 3]))
def test_any_mask_on_any_layout(
    mask: Mask, layout: Layout, length: int, stages: int | None
) -> None:
    run(mask, layout, length, length, stages)


@pytest.mark.parametrize("name", FOR_ANY_LENGTH)
@pytest.mark.parametrize("cp_size", [1, 3, 4])
def test_one_schedule_serves_many_lengths(name: str, cp_size: int) -> None:
    layout = Layout(name, cp_size)
    mask = Mask(causal(), 2) & documents(0) & key_padding(1)
    for chunk in (2, 5):
        run(mask, layout, chunk * layout.num_chunks, None, None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_lengths_around_a_multiple_of_the_ranks(name: str) -> None:
    for length in (31, 32, 33, 37):
        run(Mask(causal()) & window(6), Layout(name, 4), length, length, None)


@pytest.mark.parametrize(
    ("name", "cp_size", "offset", "is_causal"),
    [
        *itertools.product(FOR_ANY_LENGTH, (2, 3), ("paper",), (True,)),
        ("contiguous", 4, "torchscale", True),
        ("zigzag", 2, "kv_head", False),
        ("striped", 5, "paper", False),
    ],
)
def test_longnet(name: str, cp_size: int, offset: str, *, is_causal: bool) -> None:
    length = 41
    mask = Mask(causal()) if is_causal else Mask()
    pattern = LongNet((5, 12, 30), (1, 3, 4), offset=offset)
    schedule = build_schedule(
        pattern.build_parts(mask, AttentionSpec(H, G, length)),
        Layout(name, cp_size),
        length,
    )
    inputs = [x.requires_grad_() for x in tensors(length)[:3]]
    out = reference.longnet(
        *inputs,
        segments=pattern.segments,
        rates=pattern.rates,
        offset=offset,
        mask=mask,
    )
    assert_simulates(schedule, length, out, inputs, None)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_curves(cp_size: int) -> None:
    """37 tokens share no divisor with the ranks; 64 are a whole curve."""
    mask = Mask(causal(), 2)
    for length in (37, 64):
        for segment in (None, 16):
            layout = Layout("hilbert", cp_size, segment)
            run(mask, layout, length, length, None)
            run(mask & window(6), layout, length, length, 2)
            run(mask & documents(0) & key_padding(1), layout, length, length, None)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_longnet_on_a_curve_through_each_segment(cp_size: int) -> None:
    length, pattern = 41, LongNet((5, 12, 16), (1, 3, 4))
    parts = pattern.build_parts(Mask(causal()), AttentionSpec(H, G, length))
    schedule = build_schedule(parts, Layout("hilbert", cp_size, 16), length)
    check_schedule(schedule)
    inputs = [x.requires_grad_() for x in tensors(length)[:3]]
    out = reference.longnet(
        *inputs, segments=pattern.segments, rates=pattern.rates, mask=Mask(causal())
    )
    assert_simulates(schedule, length, out, inputs, None)


def test_longnet_with_padding_keys() -> None:
    mask = Mask(causal(), 2) & key_padding(1)
    pattern = LongNet((8, 16), (2, 3))
    schedule = build_schedule(
        pattern.build_parts(mask, AttentionSpec(H, G, 29)), Layout("zigzag", 2), 29
    )
    inputs = [x.requires_grad_() for x in tensors(29)[:3]]
    out = reference.longnet(
        *inputs,
        segments=pattern.segments,
        rates=pattern.rates,
        mask=mask,
        captures=captures(B, 29),
    )
    assert_simulates(schedule, 29, out, inputs, None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_local_window(name: str) -> None:
    pattern = LocalWindow(12, block=4)
    mask = Mask(causal())
    schedule = build_schedule(
        pattern.build_parts(mask, AttentionSpec(H, G, 43)), Layout(name, 3), 43
    )
    inputs = [x.requires_grad_() for x in tensors(43)[:3]]
    out = reference.local_window(*inputs, window=12, block=4, mask=mask)
    assert_simulates(schedule, 43, out, inputs, None)
