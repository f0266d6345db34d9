"""Tile kernels and merges against the dense float64 definition."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support import dense
from torch import Tensor

import ringcompile.lowering  # noqa: F401
from ringcompile import ops
from ringcompile.ir.mask import EmptyRow, Mask, causal, key_padding, window
from ringcompile.ir.text import format_mask
from ringcompile.lowering.merge import merge
from ringcompile.lowering.tiles import math
from ringcompile.lowering.tiles.dense import (
    Backend,
    attend,
    attend_backward,
    choose_backend,
)

SCALE = 0.4


def tensors(
    n: int, m: int, heads: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H, G, D, E = heads
    random = torch.Generator().manual_seed(0)
    sizes = [(2, H, n, D), (2, G, m, D), (2, G, m, E), (2, H, n, E)]
    q, k, v, grad = (
        torch.randn(size, generator=random, dtype=torch.double) for size in sizes
    )
    return q.to(dtype), k.to(dtype), v.to(dtype), grad.to(dtype)


def dense_gradients(
    qkv: tuple[Tensor, Tensor, Tensor], grad: Tensor, kept: Tensor
) -> tuple[Tensor, ...]:
    """out, dq, dk and dv in float64."""
    inputs = [x.double().requires_grad_() for x in qkv]
    q, k, v = inputs
    out = dense.attend(q, k, v, kept, SCALE, EmptyRow.ZERO)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.double())


def close(got: Tensor, want: Tensor, limit: float) -> bool:
    return bool((got.double() - want).abs().max() <= limit * want.abs().max())


LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("heads", [(4, 2, 8, 8), (4, 1, 8, 4), (2, 2, 4, 4)])
def test_masked_attention_over_several_blocks(
    dtype: torch.dtype, heads: tuple[int, int, int, int]
) -> None:
    S, mask = 300, Mask(causal() & window(170) & key_padding(0), 1)
    padding = torch.ones(2, S, dtype=torch.int64)
    padding[1, :40] = 0  # its first 40 rows have no key
    q, k, v, grad = tensors(S, S, heads, dtype)
    at = torch.arange(S)[None]
    options = {"mask": format_mask(mask), "scale": SCALE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math, "_KV_ROWS", 96)
        out, lse = ops.MASKED_ATTENTION(q, k, v, at, at, [padding], [], **options)
        grads = ops.MASKED_ATTENTION_BACKWARD(
            *(grad, q, k, v, out.to(dtype), lse, at, at, [padding], []), **options
        )
    want = dense_gradients(
        (q, k, v), grad, dense.keeps(mask, [padding], (2, heads[0], S))
    )
    for got, expected in zip((out, *grads), want, strict=True):
        assert got.dtype == ops.accumulation_dtype(dtype)
        assert close(got, expected, LIMITS[dtype])
    assert (lse[1, :, :40] == -torch.inf).all()
    assert (out[1, :, :40] == 0).all()
    assert (grads[0][1, :, :40] == 0).all()
    assert lse[0].isfinite().all()


def test_positions_are_per_head_and_may_be_absent() -> None:
    heads = (4, 2, 8, 8)
    q, k, v, grad = tensors(6, 5, heads, torch.float64)
    q_pos = torch.tensor([[0, 3, 5, 9, -1, -1], [1, 2, 4, 7, 8, 9]] * 2)
    k_pos = torch.tensor([[0, 2, 4, 8, -1], [1, 3, 5, 7, 9]])
    kept = (q_pos[:, :, None] >= k_pos.repeat_interleave(2, 0)[:, None]) & (
        (q_pos >= 0)[:, :, None] & (k_pos >= 0).repeat_interleave(2, 0)[:, None]
    )
    options = {"mask": format_mask(Mask(causal())), "scale": SCALE}
    out, lse = ops.MASKED_ATTENTION(q, k, v, q_pos, k_pos, [], [], **options)
    grads = ops.MASKED_ATTENTION_BACKWARD(
        *(grad, q, k, v, out, lse, q_pos, k_pos, [], []), **options
    )
    want = dense_gradients((q, k, v), grad, kept.expand(2, -1, -1, -1))
    for got, expected in zip((out, *grads), want, strict=True):
        assert close(got, expected, 1e-12)


def test_empty_blocks_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math, "_KV_ROWS", 128)
    real, num_blocks = math._Tile.scores, 0

    def count(tile: math._Tile, *at: Any, **options: Any) -> math._Scores | None:  # noqa: ANN401
        nonlocal num_blocks
        scores = real(tile, *at, **options)
        num_blocks += scores is not None
        return scores

    monkeypatch.setattr(math._Tile, "scores", count)
    q, k, v, _ = tensors(512, 512, (1, 1, 4, 4), torch.float32)
    at = torch.arange(512)[None]
    mask = format_mask(Mask(causal()))
    ops.MASKED_ATTENTION(q, k, v, at, at, [], [], mask=mask, scale=SCALE)
    assert num_blocks == 4 + 3 + 2 + 1


def visited(
    monkeypatch: pytest.MonkeyPatch, mask: Mask, order: str, sizes: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """Numbers ``y * 2^n + x`` of blocks of 4 x 4 with a pair; forward, backward."""
    n, m = sizes
    side = 4 if max(sizes) > 8 else 2
    real, seen = math._Tile.scores, list[int]()

    def note(
        tile: math._Tile,
        i: slice,
        j: slice,
        *rest: Any,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> math._Scores | None:
        scores = real(tile, i, j, *rest, **options)
        if scores is not None:
            seen.append(i.start // 4 * side + j.start // 4)
        return scores

    monkeypatch.setattr(math._Tile, "scores", note)
    monkeypatch.setattr(math, "_Q_ROWS", 4)
    monkeypatch.setattr(math, "_KV_ROWS", 4)
    q, k, v, grad = tensors(n, m, (2, 1, 4, 4), torch.float64)
    captures: list[Tensor] = []
    at = (torch.arange(n)[None], torch.arange(m)[None], captures, captures)
    options = {"mask": format_mask(mask), "scale": SCALE, "block_order": order}
    out, lse = ops.MASKED_ATTENTION(q, k, v, *at, **options)
    forward, seen[:] = [*seen], []
    ops.MASKED_ATTENTION_BACKWARD(grad, q, k, v, out, lse, *at, **options)
    return forward, seen


CURVE = [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]
ABOVE = {1, 2, 3, 6, 7, 11}


@pytest.mark.parametrize(
    ("mask", "order", "sizes", "expected"),
    [
        (Mask(), "hilbert", (8, 8), [0, 2, 3, 1]),
        (Mask(), "natural", (8, 8), [0, 1, 2, 3]),
        (Mask(), "hilbert", (16, 15), CURVE),
        (Mask(), "hilbert", (6, 16), [0, 1, 5, 4, 7, 6, 2, 3]),
        (Mask(), "hilbert", (14, 8), [0, 1, 5, 4, 8, 12, 13, 9]),
        (Mask(causal()), "hilbert", (16, 16), [x for x in CURVE if x not in ABOVE]),
    ],
)
def test_blocks_are_visited_in_order(
    monkeypatch: pytest.MonkeyPatch,
    mask: Mask,
    order: str,
    sizes: tuple[int, int],
    expected: list[int],
) -> None:
    assert visited(monkeypatch, mask, order, sizes) == (expected, expected)


@pytest.mark.parametrize("dtype", LIMITS)
def test_the_order_of_blocks_changes_no_result(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(math, "_Q_ROWS", 16)
    monkeypatch.setattr(math, "_KV_ROWS", 24)
    S, heads = 150, (4, 2, 8, 4)
    q, k, v, grad = tensors(S, S, heads, dtype)
    at, padding = torch.arange(S)[None], torch.ones(2, S, dtype=torch.int64)
    padding[1, :40] = 0  # its first 40 rows have no key
    mask = Mask(causal() & window(70) & key_padding(0), 1)
    results = []
    for order in ("natural", "hilbert"):
        options = {"mask": format_mask(mask), "scale": SCALE, "block_order": order}
        out, lse = ops.MASKED_ATTENTION(q, k, v, at, at, [padding], [], **options)
        grads = ops.MASKED_ATTENTION_BACKWARD(
            *(grad, q, k, v, out.to(dtype), lse, at, at, [padding], []), **options
        )
        results.append((out, lse.exp(), *grads))
    want = dense_gradients(
        (q, k, v), grad, dense.keeps(mask, [padding], (2, heads[0], S))
    )
    for natural, curve in zip(*results, strict=True):
        assert close(curve, natural.double(), min(LIMITS[dtype], 3e-6))
    out, _, *grads = results[1]
    for got, expected in zip((out, *grads), want, strict=True):
        assert close(got, expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 2, 8, 8), (4, 2, 8, 4)])
def test_dense_tiles(
    dtype: torch.dtype, is_causal: bool, heads: tuple[int, int, int, int]
) -> None:
    n, m = 33, 33 if is_causal else 20
    q, k, v, grad = tensors(n, m, heads, dtype)
    is_flash = heads[2] == heads[3]
    assert choose_backend(q, v) is (Backend.CPU_FLASH if is_flash else Backend.MATH)
    out, lse = attend(q, k, v, is_causal=is_causal, scale=SCALE)
    rounded = out.to(dtype)
    grads = attend_backward(
        grad, q, k, v, rounded, lse, is_causal=is_causal, scale=SCALE
    )
    kept = torch.ones(2, heads[0], n, m, dtype=torch.bool)
    want = dense_gradients((q, k, v), grad, kept.tril() if is_causal else kept)
    for got, expected in zip((out, *grads), want, strict=True):
        assert close(got, expected, LIMITS[dtype])


def test_a_row_whose_lse_is_infinite_has_no_gradient() -> None:
    q, k, v, grad = tensors(9, 9, (2, 1, 8, 8), torch.float32)
    out, lse = attend(q, k, v, is_causal=False, scale=SCALE)
    lse[:, :, 4] = torch.inf
    dq, dk, dv = attend_backward(grad, q, k, v, out, lse, is_causal=False, scale=SCALE)
    rest = [0, 1, 2, 3, 5, 6, 7, 8]
    some_grad, some_q, some_out, some_lse = (x[:, :, rest] for x in (grad, q, out, lse))
    without = attend_backward(
        some_grad, some_q, k, v, some_out, some_lse, is_causal=False, scale=SCALE
    )
    assert (dq[:, :, 4] == 0).all()
    for got, want in zip((dk, dv), without[1:], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_is_attention_over_both(dtype: torch.dtype) -> None:
    q, k, v, _ = tensors(7, 12, (2, 2, 8, 8), dtype)
    whole = attend(q, k, v, is_causal=False, scale=SCALE)
    halves = [
        attend(q, k[:, :, at], v[:, :, at], is_causal=False, scale=SCALE)
        for at in (slice(0, 5), slice(5, 12))
    ]
    for got, want in zip(merge(*halves), whole, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want)


def test_merge_of_rows_without_keys() -> None:
    out = torch.tensor([0.0, 0.0, 3.0]).view(1, 1, 3, 1)
    lse = torch.tensor([-torch.inf, -torch.inf, 500.0]).view(1, 1, 3)
    other = (torch.tensor([0.0, 2.0, 0.0]).view(1, 1, 3, 1), lse[..., [0, 2, 0]])
    got_out, got_lse = merge((out, lse), other)
    assert got_out.flatten().tolist() == [0.0, 2.0, 3.0]
    assert got_lse.flatten().tolist() == [-torch.inf, 500.0, 500.0]


@pytest.mark.parametrize(("rows", "backend"), [(2, "CUDNN"), (1, "CUDA_FLASH")])
def test_a_single_row_is_not_for_cudnn(
    monkeypatch: pytest.MonkeyPatch, rows: int, backend: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    many, few = (
        SimpleNamespace(
            shape=(1, 2, n, 64), device=torch.device("cuda"), dtype=torch.bfloat16
        )
        for n in (8, rows)
    )
    for pair in ((many, few), (few, many)):
        assert choose_backend(*cast("Any", pair)) is Backend[backend]
