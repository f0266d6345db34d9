"""A module in the place of ``nn.MultiheadAttention``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringcompile.errors import OptionError
from ringcompile.modules.heads import Masking, attend_heads, read_masks
from ringcompile.modules.runner import make_runner, require_compiled
from ringcompile.preset import (
    RingAttentionConfig,
    changed_fields,
    find_hardware,
    pick_preset,
    run_options,
)

MULTIHEAD = "block_sparse_multihead"


class MultiheadRingAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` over the ranks of a mesh, with a pattern.

    The same parameters, ``state_dict`` and arguments; projections and attention are one
    compiled graph, cut along the sequence. Weights are never returned:
    ``need_weights`` is False by default and refused otherwise.

    Args:
        embed_dim: width of queries and of the output.
        num_heads: heads.
        dropout: share of weights that training drops.
        bias: whether projections have one.
        kdim: width of keys; None: ``embed_dim``.
        vdim: width of values; None: ``embed_dim``.
        batch_first: whether tensors are ``(B, S, E)`` rather than ``(S, B, E)``.
        device: of the parameters.
        dtype: of the parameters.
        attention: a pattern, a preset's name or ``"exact"``.
        config: what a preset is made from.
        mesh: as the option ``mesh``; None for the default group.
        layer: number of the layer that it is for.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - torch's, and its own
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,  # noqa: ANN401 - torch's
        dtype: Any = None,  # noqa: ANN401 - torch's
        *,
        attention: object = MULTIHEAD,
        config: RingAttentionConfig | None = None,
        mesh: object = None,
        layer: int = 0,
    ) -> None:
        for name, value in (
            ("add_bias_kv", add_bias_kv),
            ("add_zero_attn", add_zero_attn),
        ):
            if value:
                raise OptionError(
                    f"{name}={value}",
                    at="MultiheadRingAttention",
                    because="a key that is no token has no place in the sequence",
                    instead="nn.MultiheadAttention, or a token of your own",
                )
        super().__init__(
            *(embed_dim, num_heads, dropout, bias, False, False, kdim, vdim),
            *(batch_first, device, dtype),
        )
        # Else nn.TransformerEncoderLayer calls one fused op in the place of forward.
        self._qkv_same_embed_dim = False
        config = config or RingAttentionConfig()
        own = {"embed_dim": embed_dim, "num_heads": num_heads, "bias": bias}
        _check_agreement(config, own | {"dropout": dropout})
        self.reason = self.note = ""
        if isinstance(attention, str) and attention != "exact":
            found, self.reason = pick_preset(attention, find_hardware(mesh), config)
            options, self.note = found.options(config, is_multihead=True), found.note()
        else:
            options = {"attention": attention, **run_options(config)}
        self._runner = make_runner(
            options, config, mesh=mesh, layer=layer, name="MultiheadRingAttention"
        )

    @torch.compiler.disable
    def forward(  # noqa: PLR0913, PLR0917 - torch's
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend as ``nn.MultiheadAttention`` does; the same tensors on every rank.

        Args:
            query: ``(S, B, E)``, ``(B, S, E)`` if ``batch_first``, or ``(S, E)``.
            key: the same with ``kdim``.
            value: the same with ``vdim``.
            key_padding_mask: ``(B, S)`` or ``(S,)``, true (or -inf) where a key is not
                seen.
            need_weights: must be False.
            attn_mask: ``(S, S)`` or ``(B * num_heads, S, S)``, true (or -inf) where a
                pair is not seen; as for ``RingAttention``.
            average_attn_weights: without effect, as no weights are returned.
            is_causal: whether no query sees a later key; with ``attn_mask``, on top.

        Returns:
            The output, shaped as ``query``, and None for the weights.

        Raises:
            OptionError: weights are asked for, or a mask is off.
            UnsupportedAttentionError: a mask or bias can't be carried.
        """
        del average_attn_weights
        if need_weights:
            raise OptionError(
                "need_weights=True",
                at="MultiheadRingAttention",
                because="the weights of all pairs are on no rank",
                instead="need_weights=False",
            )
        is_batched = query.dim() == 3  # noqa: PLR2004
        tensors = [query, key, value]
        if not is_batched:
            tensors = [x[None] for x in tensors]
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask[None]
        elif not self.batch_first:
            tensors = [x.transpose(0, 1) for x in tensors]
        (batch, rows), keys = tensors[0].shape[:2], tensors[1].shape[1]
        sizes = (batch, self.num_heads, rows, keys)
        masks = read_masks(self._runner, attn_mask, key_padding_mask, sizes)
        dropout = self.dropout if self.training else 0.0
        out = self._runner.run(
            _attend_multihead,
            *tensors,
            *(self._in_weights(), self.in_proj_bias),
            *(self.out_proj.weight, self.out_proj.bias),
            *(self.num_heads, Masking(*masks, is_causal, dropout)),
            training=self.training,
        )
        if not is_batched:
            return out[0], None
        return out if self.batch_first else out.transpose(0, 1), None

    def _in_weights(self) -> tuple[Tensor, ...]:
        """Weights of q, k and v; one tensor where they have one width."""
        packed: Tensor | None = self.in_proj_weight  # annotated as if never None
        if packed is None:
            return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return (packed,)

    def _reset_parameters(self) -> None:
        """As torch's, which goes by a flag that is off here."""
        packed: Tensor | None = self.in_proj_weight
        self._qkv_same_embed_dim = packed is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def extra_repr(self) -> str:
        """The pattern, and why it was chosen."""
        pattern = self._runner.options.attention
        return "; ".join(filter(None, (str(pattern), self.reason, self.note)))


def _check_agreement(config: RingAttentionConfig, own: dict[str, object]) -> None:
    """Refuse a configuration that says something else than the arguments."""
    for name in set(own) & set(changed_fields(config)):
        if (value := getattr(config, name)) != own[name]:
            raise OptionError(
                f"{name}={own[name]!r} with {name}={value!r} in the configuration",
                at="MultiheadRingAttention",
                because="they contradict each other",
                instead=f"leave {name} out of the configuration",
            )


def _attend_multihead(  # noqa: PLR0913, PLR0917 - tensors, weights and masks
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_weights: tuple[Tensor, ...],
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    masking: Masking,
) -> Tensor:
    """Over ``(B, S, E)``."""
    require_compiled()
    weights = in_weights[0].chunk(3) if len(in_weights) == 1 else in_weights
    biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    out = attend_heads(q, k, v, masking)
    return F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)
