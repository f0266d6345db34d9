"""Partial results over disjoint keys, merged by their log-sum-exp."""

import torch
from torch import Tensor

from ringcompile import ops


def merge(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Combine two partial results for the same query rows.

    Args:
        first: out ``(B, H, T, E)`` and lse ``(B, H, T)``, float32 or float64.
        second: the same over other keys (or over the same ones, counted twice).

    Returns:
        out and lse over all keys; a row without any has out 0 and lse -inf.
    """
    (out_1, lse_1), (out_2, lse_2) = first, second
    top = torch.maximum(lse_1, lse_2)
    top = torch.where(top == -torch.inf, 0.0, top)
    weight_1, weight_2 = torch.exp(lse_1 - top), torch.exp(lse_2 - top)
    total = weight_1 + weight_2
    lse = top + torch.log(total)
    total = torch.where(total == 0, 1.0, total)
    # In memory: else what goes over features computes them for each of those anew.
    weight_1, weight_2 = ops.STORE(weight_1 / total), ops.STORE(weight_2 / total)
    return out_1 * weight_1[..., None] + out_2 * weight_2[..., None], lse
