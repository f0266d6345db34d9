"""Attention over heads under the masks that modules take, as compiled code has it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ringcompile.errors import OptionError
from ringcompile.modules.runner import Runner


class Masking(NamedTuple):
    """What happens to scores and weights.

    Attributes:
        hidden: bool, true where a pair is not seen; broadcasts to ``(B, H, S, S)``.
        bias: float, added to the scores.
        padding: bool ``(B, S)``, true where a key is not seen.
        is_causal: whether no query sees a later key.
        dropout: share of weights that are dropped.
    """

    hidden: Tensor | None
    bias: Tensor | None
    padding: Tensor | None
    is_causal: bool
    dropout: float


def attend_heads(q: Tensor, k: Tensor, v: Tensor, masking: Masking) -> Tensor:
    """Over ``(B, H, S, D)``."""
    hidden, bias, padding, is_causal, dropout = masking
    seen = None if hidden is None else ~hidden
    if padding is not None:
        keys = ~padding[:, None, None, :]
        seen = keys if seen is None else seen & keys
    if is_causal and (seen is not None or bias is not None):
        rows, keys = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
        earlier = rows[:, None] >= keys[None]
        seen = earlier if seen is None else seen & earlier
        is_causal = False
    if bias is not None:
        seen = bias if seen is None else bias.masked_fill(~seen, -torch.inf)
    return F.scaled_dot_product_attention(
        *(q, k, v),
        attn_mask=seen,
        dropout_p=dropout,
        is_causal=is_causal,
        enable_gqa=k.shape[1] != q.shape[1],
    )


def read_masks(
    runner: Runner,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sizes: tuple[int, int, int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check masks and tell what is not seen from what is added to the scores.

    Args:
        runner: of the module.
        attn_mask: as the user gives it.
        key_padding_mask: likewise.
        sizes: batch, heads, queries, keys.

    Returns:
        The first three fields of ``Masking``.
    """
    batch, heads, rows, keys = sizes
    if attn_mask is not None:
        if attn_mask.dim() == 3 and attn_mask.shape[0] == batch * heads:  # noqa: PLR2004
            attn_mask = attn_mask.unflatten(0, (batch, heads))
        _check_shape(runner, "attn_mask", attn_mask, (batch, heads, rows, keys))
    if key_padding_mask is not None:
        _check_shape(runner, "key_padding_mask", key_padding_mask, (batch, keys))
    hidden, bias = _split(runner, "attn_mask", attn_mask)
    padding, rest = _split(runner, "key_padding_mask", key_padding_mask)
    if rest is not None:
        raise OptionError(
            "key_padding_mask of other floats than 0 and -inf",
            at=runner.name,
            because="it says which keys are not seen",
            instead="a bool mask, or attn_mask for a bias",
        )
    return hidden, bias, padding


_LEAST_DIMS = 2


def _check_shape(
    runner: Runner, name: str, mask: Tensor, wanted: tuple[int, ...]
) -> None:
    shape = tuple(mask.shape)
    pairs = zip(shape[::-1], wanted[::-1], strict=False)
    is_alike = all(n in {1, size} for n, size in pairs)
    if not (_LEAST_DIMS <= len(shape) <= len(wanted) and is_alike):
        raise OptionError(
            f"{name} {shape}",
            at=runner.name,
            because=f"the attention is {wanted}",
            instead=f"a mask that broadcasts to {wanted}",
        )


def _split(
    runner: Runner, name: str, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """A bool mask of what is not seen, or else what is added to the scores."""
    if mask is None:
        return None, None
    if mask.dtype is torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise OptionError(
            f"{name} of {mask.dtype}",
            at=runner.name,
            because="it is either true where a pair is not seen, or added to scores",
            instead="a bool or a float tensor",
        )
    dropped = mask == -torch.inf
    if not mask.requires_grad and bool((dropped | (mask == 0)).all()):
        return dropped, None
    if not runner.is_exact:
        raise OptionError(
            f"{name} of other floats than 0 and -inf",
            at=runner.name,
            because="scores that are added to can't be carried under a pattern yet",
            instead="a bool mask, or an exact preset",
        )
    return None, mask
