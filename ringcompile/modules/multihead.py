"""A module in the place of ``nn.MultiheadAttention``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringcompile.errors import OptionError
from ringcompile.modules.heads import Masking, attend_heads, split_mask
from ringcompile.modules.runner import make_runner, require_compiled
from ringcompile.preset import RingAttentionConfig, find_hardware, pick_preset

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
        mesh: 1-D ``DeviceMesh``, process group, or None for the default group.
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
        options = {"attention": attention}
        if isinstance(attention, str) and attention != "exact":
            found, _ = pick_preset(attention, find_hardware(mesh), config)
            options = found.options(config)
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
            key_padding_mask = (
                None if key_padding_mask is None else key_padding_mask[None]
            )
        elif not self.batch_first:
            tensors = [x.transpose(0, 1) for x in tensors]
        batch = tensors[0].shape[0]
        hidden, bias = split_mask(attn_mask, self._runner, batch, self.num_heads)
        padding, rest = split_mask(key_padding_mask, self._runner, batch, 1)
        if rest is not None:
            raise OptionError(
                "key_padding_mask of other floats than 0 and -inf",
                at="MultiheadRingAttention",
                because="it says which keys are not seen",
                instead="a bool mask, or attn_mask for a bias",
            )
        dropout = self.dropout if self.training else 0.0
        out = self._runner.run(
            _attend_multihead,
            *tensors,
            *self._projections(),
            *(self.out_proj.weight, self.out_proj.bias),
            *(self.num_heads, Masking(hidden, bias, padding, is_causal, dropout)),
            training=self.training,
        )
        if not is_batched:
            return out[0], None
        return out if self.batch_first else out.transpose(0, 1), None

    def _projections(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Weights of q, k and v, and their biases in one."""
        packed: Tensor | None = self.in_proj_weight  # annotated as if never None
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        q, k, v = weights if packed is None else packed.chunk(3)
        return q, k, v, self.in_proj_bias


def _attend_multihead(  # noqa: PLR0913, PLR0917 - tensors, weights and masks
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    masking: Masking,
) -> Tensor:
    """Over ``(B, S, E)``."""
    require_compiled()
    biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
    inputs = ((query, q_weight), (key, k_weight), (value, v_weight))
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for (x, w), b in zip(inputs, biases, strict=True)
    )
    out = attend_heads(q, k, v, masking)
    return F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)
