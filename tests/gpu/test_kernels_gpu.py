"""Masked tiles on one GPU: kernels that Inductor generates, as exact as SDPA's.

pytest -q -m gpu tests/gpu/test_kernels_gpu.py
"""

from dataclasses import replace

import pytest
import torch
from support.compiling import compile_ring
from support.pattern_cases import CASES, PatternCase
from support.tolerances import assert_no_worse_than_one_rank
from torch import Tensor, nn

from ringcompile import patterns as p

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


def run(case: PatternCase, compiler: str, kernel: str) -> tuple[list[Tensor], str]:
    *inputs, grad = (x.cuda().bfloat16() for x in make_inputs())
    q, k, v = (x.requires_grad_() for x in inputs)
    torch.compiler.reset()
    call, record = compile_ring(
        attend,
        None,
        compiler=compiler,
        options={"attention": case.pattern, "kernel": kernel},
    )
    out = call(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    ops = " ".join(v.op for g in record.graphs for v in g.values)
    return [x.detach().cpu() for x in (out, *grads)], ops


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
}


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
    got, _ = run(case, "inductor", "auto")
    base = run_dense(case)
    for what, ours, plain, exact in zip(NAMES, got, base, want, strict=True):
        assert_no_worse_than_one_rank(ours, plain, exact, f"{what} of {name}")


def test_masked_tiles_are_flex_in_the_graphs() -> None:
    # A pattern that no other test compiles: what a cache holds is not captured.
    pattern = p.LocalWindow(512, 64)
    _, ops = run(PatternCase(pattern, CASES["local window"].counts), "capture", "auto")
    assert "flex_attention" in ops
    assert "flex_attention_backward" in ops
    assert "masked_attention" not in ops
