"""Attention by torch's own modules and transforms."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from support.spellings import D, E, H, Heads, S, Spelling, merge, split
from support.spellings_biases import CAP, alibi_of_distance, softcap

SCALE = D**-0.5


def _ahead(s: int) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool).triu(1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = (q @ k.mT * SCALE).masked_fill(_ahead(q.shape[2]), -torch.inf)
    return found.softmax(-1) @ v  # type: ignore[no-any-return]


# ---- nn.MultiheadAttention -----------------------------------------------------------


class Multihead(nn.Module):
    """The module, called with these arguments; ``mask``: makes ``attn_mask``."""

    def __init__(
        self,
        *,
        batch_first: bool = True,
        mask: Callable[[Tensor], Tensor] | None = None,
        **call: Any,  # noqa: ANN401
    ) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=batch_first)
        self.mask, self.call = mask, call

    def forward(self, x: Tensor, pads: Tensor | None = None) -> Tensor:
        mask = None if self.mask is None else self.mask(x)
        out, _ = self.attention(
            x, x, x, key_padding_mask=pads, attn_mask=mask, **self.call
        )
        return out  # type: ignore[no-any-return]


def _hidden(x: Tensor) -> Tensor:
    return _ahead(x.shape[1])


def _lowered(x: Tensor) -> Tensor:
    s = x.shape[1]
    return torch.full((s, s), -torch.inf, dtype=x.dtype).triu(1)


class FunctionalMultihead(nn.Module):
    """``F.multi_head_attention_forward``, on (S, B, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            embed_dim_to_check=E,
            num_heads=H,
            in_proj_weight=self.qkv.weight,
            in_proj_bias=self.qkv.bias,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            training=self.training,
            need_weights=False,
        )
        return out


class CrossMultihead(nn.Module):
    """Over a second sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        out, _ = self.attention(x, memory, memory, need_weights=False)
        return out  # type: ignore[no-any-return]


# ---- nn.Transformer ------------------------------------------------------------------


class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer, without or with masks."""

    def __init__(self, *, is_causal: bool = False, norm_first: bool = False) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            E, H, 2 * E, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.is_causal = is_causal

    def forward(self, x: Tensor, pads: Tensor | None = None) -> Tensor:
        mask = _lowered(x) if self.is_causal else None
        return self.layer(  # type: ignore[no-any-return]
            x, src_mask=mask, src_key_padding_mask=pads, is_causal=self.is_causal
        )


class DecoderLayer(nn.Module):
    """nn.TransformerDecoderLayer over a second sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(
            E, H, 2 * E, dropout=0.0, batch_first=True
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.layer(  # type: ignore[no-any-return]
            x, memory, tgt_mask=_lowered(x), tgt_is_causal=True
        )


# ---- flex_attention ------------------------------------------------------------------


def _block_mask(mask: Callable[..., Tensor], s: int) -> Any:  # noqa: ANN401
    return create_block_mask(mask, None, None, s, s, device="cpu")


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v)


def flex_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = _block_mask(lambda b, h, i, j: i >= j, q.shape[2])
    return flex_attention(q, k, v, block_mask=mask)


def flex_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = _block_mask(lambda b, h, i, j: (i >= j) & (i - j <= 4), q.shape[2])
    return flex_attention(q, k, v, block_mask=mask)


def flex_documents(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return documents[b, i] == documents[b, j]

    mask = create_block_mask(same, q.shape[0], None, S, S, device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


def flex_alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - (i - j).abs() * torch.exp2(-2.0 * (h + 1))

    return flex_attention(q, k, v, score_mod=bias)


def flex_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return CAP * torch.tanh(score / CAP)

    return flex_attention(q, k, v, score_mod=cap)


def flex_causal_by_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def hide(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i >= j, score, -float("inf"))

    return flex_attention(q, k, v, score_mod=hide)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = ~_ahead(q.shape[2]).logical_or(torch.ones(S, S, dtype=torch.bool).tril(-5))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def documents_sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    keep = documents[:, None, :, None] == documents[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def of_flex(
    name: str,
    attend: Callable[..., Tensor],
    like: Callable[..., Tensor],
    *inputs: str,
) -> Spelling:
    return Spelling(
        f"flex_attention: {name}",
        lambda: Heads(attend),
        inputs,
        like=lambda: Heads(like),
    )


# ---- transforms ----------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Two layers, each under activation checkpointing."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Heads(_causal), Heads(_causal)])
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


class Nested(nn.Module):
    """One compiled body for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Heads(_causal), Heads(_causal)])
        self.run = torch.compiler.nested_compile_region(_run_layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x)
        return x


def _run_layer(layer: nn.Module, x: Tensor) -> Tensor:
    return x + layer(x)  # type: ignore[no-any-return]


class NestedInTurn(Nested):
    """One compiled body for two layers, whose masks differ by what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Heads(_filled), Heads(_filled)])
        self.run = torch.compiler.nested_compile_region(_run_masked)

    def forward(self, x: Tensor) -> Tensor:
        ahead = _ahead(x.shape[1])
        far = ahead | torch.ones_like(ahead).tril(-4)
        for layer, hidden in zip(self.layers, (ahead, far), strict=True):
            x = self.run(layer, x, hidden)
        return x


def _run_masked(layer: nn.Module, x: Tensor, hidden: Tensor) -> Tensor:
    return x + layer(x, hidden)  # type: ignore[no-any-return]


def _filled(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(hidden, -torch.inf).softmax(-1) @ v  # type: ignore[no-any-return]


class Autocast(Heads):
    """Autocast that is switched off inside of the model."""

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            q, k, v = (split(layer(x)) for layer in (self.q, self.k, self.v))
            return self.out(merge(self.attend(q, k, v)))  # type: ignore[no-any-return]


def of_multihead(name: str, *inputs: str, **arguments: Any) -> Spelling:  # noqa: ANN401
    return Spelling(
        f"nn.MultiheadAttention{name}", partial(Multihead, **arguments), inputs
    )


TABLE = (
    of_multihead(""),
    of_multihead(": no weights", need_weights=False),
    of_multihead(": sequence first", need_weights=False, batch_first=False),
    of_multihead(": padding", "pads", need_weights=False),
    of_multihead(": bools", need_weights=False, mask=_hidden),
    of_multihead(": floats", mask=_lowered),
    of_multihead(": is_causal", need_weights=False, mask=_hidden, is_causal=True),
    of_multihead(": causal, padding", "pads", need_weights=False, mask=_hidden),
    Spelling("nn.MultiheadAttention: cross", CrossMultihead, ("memory",)),
    Spelling("F.multi_head_attention_forward", FunctionalMultihead, shape=(S, 2, E)),
    Spelling("nn.TransformerEncoderLayer", EncoderLayer),
    Spelling("nn.TransformerEncoderLayer: padding", EncoderLayer, ("pads",)),
    Spelling(
        "nn.TransformerEncoderLayer: causal", lambda: EncoderLayer(is_causal=True)
    ),
    Spelling(
        "nn.TransformerEncoderLayer: eval", lambda: EncoderLayer(norm_first=True).eval()
    ),
    Spelling(
        "nn.TransformerEncoderLayer: fast path",
        lambda: EncoderLayer().eval(),
        has_gradients=False,
    ),
    Spelling(
        "nn.TransformerEncoderLayer: fast path, padding",
        lambda: EncoderLayer().eval(),
        ("pads",),
        has_gradients=False,
    ),
    Spelling("nn.TransformerDecoderLayer", DecoderLayer, ("memory",), num_regions=2),
    of_flex("dense", flex, F.scaled_dot_product_attention),
    of_flex("causal", flex_causal, _causal),
    of_flex("window", flex_window, window),
    of_flex("documents", flex_documents, documents_sdpa, "documents"),
    of_flex("ALiBi", flex_alibi, alibi_of_distance),
    of_flex("softcap", flex_softcap, softcap),
    of_flex("causal by score_mod", flex_causal_by_score, _causal),
    Spelling("checkpoint", lambda: Checkpointed(use_reentrant=False), num_regions=2),
    Spelling(
        "checkpoint, reentrant", lambda: Checkpointed(use_reentrant=True), num_regions=2
    ),
    Spelling("nested_compile_region", Nested, num_regions=2),
    Spelling("nested_compile_region, two masks", NestedInTurn, num_regions=2),
    Spelling("autocast switched off", lambda: Autocast(_causal)),
)
