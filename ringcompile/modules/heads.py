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
        at = torch.arange(q.shape[2], device=q.device)
        earlier = at[:, None] >= at[None]
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


def split_mask(
    mask: Tensor | None, runner: Runner, batch: int, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """A bool mask of what is not seen, or else what is added to the scores."""
    if mask is None:
        return None, None
    if mask.dim() == 3 and mask.shape[0] == batch * heads:  # noqa: PLR2004
        mask = mask.view(batch, heads, *mask.shape[1:])
    if mask.dtype is torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise OptionError(
            f"attn_mask of {mask.dtype}",
            at=runner.name,
            because="it is either true where a pair is not seen, or added to scores",
            instead="a bool or a float tensor",
        )
    dropped = mask == -torch.inf
    if not mask.requires_grad and bool((dropped | (mask == 0)).all()):
        return dropped, None
    if not runner.is_exact:
        raise OptionError(
            "attn_mask of other floats than 0 and -inf",
            at=runner.name,
            because="scores that are added to can't be carried under a pattern yet",
            instead="a bool mask, or an exact preset",
        )
    return None, mask
