"""Masked tiles on one GPU: kernels that Inductor generates, as exact as SDPA's.

pytest -q -m gpu tests/gpu/test_kernels_gpu.py
"""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from support import ring_cases
from support.compiling import compile_ring
from support.pattern_cases import CASES, PatternCase, of_blocks, of_table, with_random
from support.ring_cases import Case, plan_text
from support.score_kernels import expect_tile, run_tile
from support.tolerances import assert_no_worse_than_one_rank
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringcompile import ops
from ringcompile import patterns as p
from ringcompile.lowering import cut_masks, program
from ringcompile.lowering.tiles import flex, pieces
from ringcompile.lowering.tiles.dense import attend as attend_dense

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU"),
]

B, H, G, S, D = 1, 4, 2, 1000, 64
NAMES = ("out", "dq", "dk", "dv")


def make_inputs() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = (H, G, G, H)
    return [torch.randn(B, n, S, D, generator=random) for n in sizes]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        *(q, k, v), is_causal=True, enable_gqa=True
    )


def run(case: PatternCase, compiler: str, kernel: str) -> list[Tensor]:
    *inputs, grad = (x.cuda().bfloat16() for x in make_inputs())
    q, k, v = (x.requires_grad_() for x in inputs)
    torch.compiler.reset()
    call, _ = compile_ring(
        attend,
        None,
        compiler=compiler,
        options={"attention": case.pattern, "kernel": kernel},
    )
    out = call(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    return [x.detach().cpu() for x in (out, *grads)]


def wanted(case: PatternCase) -> list[Tensor]:
    *inputs, grad = (x.bfloat16().double() for x in make_inputs())
    q, k, v = (x.requires_grad_() for x in inputs)
    out = case.attend(q, k, v, is_causal=True)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


GPU_CASES = {
    "local window": replace(
        CASES["local window"],
        pattern=p.LocalWindow(256, 64),
        counts=lambda H, _G, S: _near(H, S, 64, 2),
    ),
    "sinks": CASES["sinks"],
    "strided": CASES["strided"],
    "global local": CASES["global local"],
    "custom function": CASES["custom function"],
    "longnet kv_head": CASES["longnet kv_head"],
    "longnet paper": CASES["longnet paper"],
    "by head": CASES["by head"],
    "bigbird random": CASES["bigbird random"],
    "custom table": of_table(4, 250, 1000),
    "dilated window": replace(
        CASES["dilated window"],
        pattern=p.DilatedWindow(100, 4),
        counts=lambda H, _G, S: _dilated(H, S, 4, 100),
    ),
}


def _dilated(num_heads: int, length: int, rate: int, window: int) -> Tensor:
    at = torch.arange(length)
    apart = (at[:, None] - at[None]).abs()
    kept = (apart % rate == 0) & (apart <= window * rate)
    return kept.expand(num_heads, length, length).int()


def test_classes_of_a_narrow_dilated_window_are_one_kernel() -> None:
    """Another window than that of other tests: what a cache holds is not traced."""
    case = replace(GPU_CASES["dilated window"], pattern=p.DilatedWindow(101, 4))
    seen = Mock(side_effect=flex.attend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "attend", seen)
        run(case, "inductor", "auto")
    assert seen.call_count > 0
    for call in seen.call_args_list:
        *_, (q, k, v), _ = call.args
        assert {x.shape[0] for x in (q, k, v)} == {4 * B}
        assert {x.shape[2] for x in (q, k, v)} == {S // 4}


def _near(num_heads: int, length: int, block: int, reach: int) -> Tensor:
    i = torch.arange(length) // block
    kept = (i[:, None] - i[None]).abs() <= reach
    return kept.expand(num_heads, length, length).int()


def run_dense(case: PatternCase) -> list[Tensor]:
    """torch's own kernel in bfloat16, under the dense mask ``log C``."""
    *inputs, grad = (x.cuda().bfloat16() for x in make_inputs())
    q, k, v = (x.requires_grad_() for x in inputs)
    counts = case.count(H, G, S, is_causal=True).double().log().cuda().bfloat16()
    full_k, full_v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    out = nn.functional.scaled_dot_product_attention(
        q, full_k, full_v, attn_mask=counts[None]
    )
    grads = torch.autograd.grad(out, (q, k, v), grad)
    return [x.detach().nan_to_num().cpu() for x in (out, *grads)]


@pytest.mark.parametrize("name", GPU_CASES)
def test_generated_kernels_lose_no_more_than_a_dense_one(name: str) -> None:
    case = GPU_CASES[name]
    want = wanted(case)
    got = run(case, "inductor", "auto")
    base = run_dense(case)
    for what, ours, plain, exact in zip(NAMES, got, base, want, strict=True):
        assert_no_worse_than_one_rank(ours, plain, exact, f"{what} of {name}")


def test_no_masked_tile_is_left_to_plain_operators() -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("plain operators")

    # A pattern that no other test compiles: what a cache holds is not traced.
    case = PatternCase(p.LocalWindow(512, 64), CASES["local window"].counts)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MASKED_ATTENTION", "MASKED_ATTENTION_BACKWARD"):
            patch.setattr(ops, name, refuse)
        run(case, "inductor", "auto")
        with pytest.raises(Exception, match="plain operators"):
            run(case, "eager", "math")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_biases_have_the_same_gradients_in_each_run(dtype: torch.dtype) -> None:
    first, second = (run_tile("cuda", dtype) for _ in range(2))
    expected = expect_tile("cuda")
    limit = {torch.float64: 1e-13, torch.float32: 5e-6}[dtype]
    largest = max(x.abs().max() for x in expected)
    for got, again, want in zip(first, second, expected, strict=True):
        assert torch.equal(got, again)
        size = max(want.abs().max(), largest / 3)
        assert (got.double() - want).abs().max() <= limit * size


def attend_documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    at = torch.arange(q.shape[2], device=q.device)
    mask = (ids[:, None, :, None] == ids[:, None, None]) & (at[:, None] >= at)
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )


def run_documents(
    call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, ids: Tensor
) -> list[Tensor]:
    xs = [x.detach().requires_grad_() for x in inputs]
    out = call(*xs, ids)
    return [out.detach(), *torch.autograd.grad(out, xs, grad)]


def check_documents(
    call: Callable[..., Tensor],
    inputs: list[Tensor],
    grad: Tensor,
    ids: Tensor,
    what: str,
) -> None:
    found = run_documents(call, inputs, grad, ids)
    plain = run_documents(attend_documents, inputs, grad, ids)
    wide = [x.double() for x in inputs]
    exact = run_documents(attend_documents, wide, grad.double(), ids)
    for name, ours, base, want in zip(NAMES, found, plain, exact, strict=True):
        assert_no_worse_than_one_rank(ours, base, want, f"{name}, {what}")


def test_documents_may_change_in_compiled_code() -> None:
    torch.compiler.reset()
    call, _ = compile_ring(attend_documents, None)
    *inputs, grad = (x.cuda().bfloat16() for x in make_inputs())
    random = torch.Generator().manual_seed(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (1, 5, 30, S):
            starts = torch.randint(0, S, (count, 1), generator=random)
            ids = (torch.arange(S) >= starts).sum(0, keepdim=True).cuda()
            check_documents(call, inputs, grad, ids, f"{count} documents")


@pytest.mark.parametrize("rows", [1000, 640])
def test_documents_of_an_open_length(rows: int) -> None:
    """One whose rows fill the kernels' blocks, or not, says nothing of the next."""
    torch.compiler.reset()
    call, _ = compile_ring(attend_documents, None, dynamic=True)
    for number in (rows, 896, 999, 256):
        *inputs, grad = (x[:, :, :number].cuda().bfloat16() for x in make_inputs())
        ids = (torch.arange(number) >= number // 3).long()[None].cuda()
        check_documents(call, inputs, grad, ids, f"{number} rows")


def _window(size: int) -> PatternCase:
    return PatternCase(
        p.DilatedWindow(size - 1), lambda H, _G, S: _near(H, S, 1, size - 1)
    )


WINDOWS = {f"window {size}": _window(size) for size in (256, 300, 1000)} | {
    "blocks": PatternCase(p.LocalWindow(640, 40), lambda H, _G, S: _near(H, S, 40, 8))
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_by_dense_kernels_lose_no_more_than_one(name: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a kernel with a mask")

    case = WINDOWS[name]
    want, base = wanted(case), run_dense(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "attend", refuse)
        patch.setattr(program, "LEAST_WINDOW", (16, 16))  # S is small
        got = run(case, "inductor", "auto")
    for what, ours, plain, exact in zip(NAMES, got, base, want, strict=True):
        assert_no_worse_than_one_rank(ours, plain, exact, f"{what}, {name}")


BIG_BIRD = with_random(
    p.BigBird(17, 1, 2, 40, seed=7),
    of_blocks(40, lambda i, j, _: ((i - j).abs() <= 8) | (i < 1) | (j < 1)),
    *(2, 40),
)


def test_a_window_beside_random_blocks_is_dense_and_loses_no_more() -> None:
    want, base = wanted(BIG_BIRD), run_dense(BIG_BIRD)
    masked, dense = Mock(side_effect=flex.attend), Mock(side_effect=attend_dense)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut_masks, "_WIDER", 1)
        patch.setattr(program, "LEAST_WINDOW", (256, 256))
        patch.setattr(flex, "attend", masked)
        patch.setattr(pieces, "attend", dense)
        got = run(BIG_BIRD, "inductor", "auto")
    assert masked.call_count == 1
    assert dense.call_count > 1
    for what, ours, plain, exact in zip(NAMES, got, base, want, strict=True):
        assert_no_worse_than_one_rank(ours, plain, exact, what)


def test_documents_of_a_known_length_compile_in_a_zigzag() -> None:
    """What such masks read is computed: positions, and ids at them."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        case = Case("documents", "zigzag", 4096, (4, 2, 64, 64), torch.bfloat16)
        case = replace(case, compile="inductor")
        group = dist.group.WORLD
        assert group is not None
        plan = plan_text(case, group, 3, timeout_s=60.0)
        inputs = [x[:, :, :1024].cuda().requires_grad_() for x in case.tensors()[:3]]
        captures = [x.cuda() for x in case.captures]
        out = ring_cases.compile_ring(plan, case)(*inputs, captures)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    finally:
        dist.destroy_process_group()
    # What peers send does not come: the shapes are all there is to see.
    assert [x.shape for x in (out, *grads)] == [x.shape for x in (inputs[0], *inputs)]
