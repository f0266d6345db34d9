"""Fused ops of ``torch.nn`` that hold an attention, written out as what they compute.

Invariant: the result is the fused op's, rows that see no key included.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from ringcompile.torch_private import ENCODER_LAYER

_KEY_PADDING = 1  # of `mask_type`; 0 is (S, S), 2 is (B, H, S, S)


def _encoder_layer(  # noqa: PLR0913, PLR0917 - the op's schema
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``torch._transformer_encoder_layer_fwd``, which has no gradient.

    Source: ``aten/src/ATen/native/transformers/transformer.cpp``.
    """
    activate = F.gelu if use_gelu else F.relu

    def attend(x: Tensor) -> Tensor:
        qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        scores = q @ k.mT * q.shape[-1] ** -0.5
        dropped = _read_dropped(mask, mask_type)
        if dropped is not None:
            scores = scores.masked_fill(dropped, -torch.inf)
        out = scores.softmax(-1) @ v
        return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        inner = activate(F.linear(x, ffn_weight_1, ffn_bias_1))
        return F.linear(inner, ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed_forward(x))


def _read_dropped(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """Which keys are dropped: those whose mask is not 0."""
    if mask is None:
        return None
    dropped = mask != 0
    return dropped[:, None, None] if mask_type == _KEY_PADDING else dropped


WRITTEN_OUT: Mapping[object, Callable[..., Tensor]] = MappingProxyType(
    {ENCODER_LAYER: _encoder_layer}
)
"""By the function that a graph calls."""
