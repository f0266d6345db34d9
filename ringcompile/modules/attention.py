"""A preset as a module."""

import torch
from torch import Tensor, nn

from ringcompile.errors import OptionError
from ringcompile.modules.heads import Masking, attend_heads, read_masks
from ringcompile.modules.runner import make_runner, require_compiled
from ringcompile.preset import Preset, RingAttentionConfig


class RingAttention(nn.Module):
    """Attention of a preset over the ranks of a mesh.

    Not part of a larger compiled graph: Dynamo breaks the graph here, and the module
    compiles by itself. To cut a whole model, compile it with the backend instead, with
    ``options=presets()[name].options(config)``.

    Args:
        preset: which system.
        config: what it is made from.
        mesh: as the option ``mesh``; None for the default group.
        layer: number of the layer that it is for.
        reason: why it was chosen.
    """

    def __init__(
        self,
        preset: Preset,
        config: RingAttentionConfig,
        *,
        mesh: object = None,
        layer: int = 0,
        reason: str = "",
    ) -> None:
        super().__init__()
        self.preset = preset.name
        self.reason = reason
        self.note = preset.note()
        self._runner = make_runner(
            preset.options(config), config, mesh=mesh, layer=layer, name=preset.name
        )

    @torch.compiler.disable
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend; the same full tensors on every rank.

        Masks are those of ``nn.MultiheadAttention``: **true marks what is not seen**.

        Args:
            q: ``(B, S, H, D)``.
            k: ``(B, S, G, D)``, H a multiple of G.
            v: ``(B, S, G, E)``.
            is_causal: whether no query sees a later key, on top of the masks.
            attn_mask: bool ``(S, S)``, ``(B * H, S, S)`` or what broadcasts to
                ``(B, H, S, S)``; or float, of 0 and -inf. Other floats are added to the
                scores where attention is exact, which then runs gathered, with a
                warning; under a pattern they are refused.
            key_padding_mask: ``(B, S)``, of keys, likewise.

        Returns:
            ``(B, S, H, E)``; 0 in rows that see no key.

        Raises:
            OptionError: shapes do not fit each other or the configuration.
            UnsupportedAttentionError: a mask or bias can't be carried.
        """
        config = self._runner.config
        _check_shapes(q, k, v, config, at=self.preset)
        sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        masks = read_masks(self._runner, attn_mask, key_padding_mask, sizes)
        dropout = config.dropout if self.training else 0.0
        masking = Masking(*masks, is_causal, dropout)
        return self._runner.run(_attend, q, k, v, masking, training=self.training)

    def extra_repr(self) -> str:
        """The preset, and what was chosen or left out."""
        return "; ".join(filter(None, (self.preset, self.reason, self.note)))


def _attend(q: Tensor, k: Tensor, v: Tensor, masking: Masking) -> Tensor:
    require_compiled()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend_heads(q, k, v, masking).transpose(1, 2)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, config: RingAttentionConfig, *, at: str
) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v)]
    is_4d = all(len(shape) == 4 for shape in shapes)  # noqa: PLR2004
    fits = is_4d and k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0
    fits = fits and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    if not (fits and q.shape[0] == k.shape[0]):
        raise OptionError(
            f"q {shapes[0]}, k {shapes[1]}, v {shapes[2]}",
            at=at,
            because="they are (batch, tokens, heads, head size), q and k of one head"
            " size, and query heads are a multiple of those of k and v",
            instead="x.unflatten(-1, (heads, -1)), without a transpose",
        )
    H, D = q.shape[2:]
    width = config.embed_dim
    if config.num_heads not in {None, H} or width not in {None, H * D}:
        raise OptionError(
            f"{H} heads of {D}",
            at=at,
            because=f"the configuration says num_heads={config.num_heads} and "
            f"embed_dim={width}",
            instead="tensors of that many heads, or leave the numbers out",
        )
