"""Tiles in which every pair counts, or all on and below a square's diagonal.

One tile to the best kernel of the device. Invariant: a causal tile is square (kernels
disagree on where a rectangle's diagonal starts).
"""

from enum import Enum

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.mask import Mask, causal
from ringcompile.ir.text import format_mask

_ATEN = torch.ops.aten
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_MASKS = {False: format_mask(Mask()), True: format_mask(Mask(causal()))}


class Backend(Enum):
    """Whose kernel computes a dense tile."""

    CPU_FLASH = "cpu_flash"
    CUDNN = "cudnn"
    CUDA_FLASH = "cuda_flash"
    MATH = "math"


def choose_backend(q: Tensor, v: Tensor) -> Backend:
    """The fastest kernel that takes these tensors."""
    D, E = q.shape[-1], v.shape[-1]
    if D != E:
        return Backend.MATH
    if q.device.type == "cpu":
        return Backend.CPU_FLASH if q.dtype in _CPU_DTYPES else Backend.MATH
    if q.device.type != "cuda" or q.dtype not in _CUDA_DTYPES or D % 8:
        return Backend.MATH
    # Hopper: 620 TFLOP/s forward by cuDNN, 340 by aten's flash (FACTS.md section 1).
    # But cuDNN's backward adds dq up in any order, and aten can't ask it not to.
    is_hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    may_vary = not torch.are_deterministic_algorithms_enabled()
    # Nor does it take a single row.
    is_row = any(type(x.shape[2]) is int and x.shape[2] == 1 for x in (q, v))
    if is_hopper and may_vary and D <= 128 and not is_row:  # noqa: PLR2004
        return Backend.CUDNN
    return Backend.CUDA_FLASH if D <= 256 else Backend.MATH  # noqa: PLR2004


def gradient_dtype(q: Tensor, v: Tensor) -> torch.dtype:
    """What ``attend_backward`` gives."""
    if choose_backend(q, v) in {Backend.CUDNN, Backend.CUDA_FLASH}:
        return q.dtype
    return ops.accumulation_dtype(q.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of one tile.

    Args:
        q: ``(B, H, n, D)``.
        k: ``(B, G, m, D)``.
        v: ``(B, G, m, E)``.
        is_causal: row i sees the rows j <= i only; n = m.
        scale: factor of the scores.

    Returns:
        out ``(B, H, n, E)``, by GPUs' kernels in the dtype of ``q``, else in that which
        partial results are merged in; natural-log lse ``(B, H, n)``, in the latter.
    """
    backend = choose_backend(q, v)
    if backend is Backend.CPU_FLASH:
        # Else each tile's results are rounded, and a ring has many.
        dtype = ops.accumulation_dtype(q.dtype)
        q, k, v = (_with_features_last(x.to(dtype)) for x in (q, k, v))
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
            q, k, v, 0.0, is_causal, scale=scale
        )
    elif backend is Backend.CUDNN:
        out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(  # noqa: SLF001
            q, k, v, None, True, 0.0, is_causal, False, scale=scale
        )
        lse = lse.view(q.shape[:3])  # it comes with a trailing dim of 1
    elif backend is Backend.CUDA_FLASH:
        out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(  # noqa: SLF001
            q, k, v, 0.0, is_causal, False, scale=scale
        )
    else:
        out, lse = ops.MASKED_ATTENTION(
            *(q, k, v, _rows(q), _rows(k), [], []), mask=_MASKS[is_causal], scale=scale
        )
    return out, lse


def attend_backward(  # noqa: PLR0913 - what a backward reads
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile, given the merged ``out`` and ``lse`` over all keys.

    Args:
        grad_out: ``(B, H, n, E)``.
        q: ``(B, H, n, D)``.
        k: ``(B, G, m, D)``.
        v: ``(B, G, m, E)``.
        out: ``(B, H, n, E)``, in the dtype of ``q``.
        lse: ``(B, H, n)``; +inf for rows without a key.
        is_causal: row i sees the rows j <= i only; n = m.
        scale: factor of the scores.

    Returns:
        dq, dk and dv, summed over the query heads that share a KV head.
    """
    backend = choose_backend(q, v)
    tensors = (grad_out, q, k, v, out)
    if backend is Backend.CPU_FLASH:
        dtype = ops.accumulation_dtype(q.dtype)
        wide = [_with_features_last(x.to(dtype)) for x in tensors]
        grads = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(  # noqa: SLF001
            *wide, lse, 0.0, is_causal, scale=scale
        )
    elif backend is Backend.CUDNN:
        lse = lse.contiguous()
        grads = _ATEN._scaled_dot_product_cudnn_attention_backward(  # noqa: SLF001
            *(*tensors, lse[..., None], *_no_seed(q), None, None, None),
            *(q.shape[2], k.shape[2], 0.0, is_causal),
            scale=scale,
        )
    elif backend is Backend.CUDA_FLASH:
        lse = lse.contiguous()  # the kernel reads it as if it were
        grads = _ATEN._scaled_dot_product_flash_attention_backward(  # noqa: SLF001
            *(*tensors, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal),
            *_no_seed(q),
            scale=scale,
        )
    else:
        grads = ops.MASKED_ATTENTION_BACKWARD(
            *(*tensors, lse, _rows(q), _rows(k), [], []),
            mask=_MASKS[is_causal],
            scale=scale,
        )
    dq, dk, dv = grads
    return dq, dk, dv


def _with_features_last(x: Tensor) -> Tensor:
    """``x`` with features next to each other: the CPU kernel takes that for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2], device=x.device)[None]


def _no_seed(q: Tensor) -> tuple[Tensor, Tensor]:
    """A dropout seed and offset: the kernels want them even without dropout."""
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    return seed, torch.zeros_like(seed)
