"""Any preset as a module, by its name."""

from torch import nn

from ringcompile.errors import OptionError
from ringcompile.modules.attention import RingAttention
from ringcompile.modules.multihead import MULTIHEAD, MultiheadRingAttention
from ringcompile.preset import RingAttentionConfig, find_hardware, pick_preset


def create_ring_attention(
    preset: str,
    config: RingAttentionConfig | None = None,
    *,
    mesh: object = None,
    layer: int = 0,
) -> nn.Module:
    """Make a module of a preset.

    Args:
        preset: a name of ``presets()``, a class name of the original, or ``"auto"``.
        config: None for the defaults.
        mesh: as the option ``mesh``; None for the default group.
        layer: number of the layer that it is for; ``checkpoint_frequency`` counts them.

    Returns:
        A ``RingAttention``; of ``block_sparse_multihead`` a ``MultiheadRingAttention``.

    Raises:
        OptionError: there is no such preset, it does not read a field that was changed,
            or there are other ranks than ``ring_size`` says.
    """
    config = config or RingAttentionConfig()
    found, reason = pick_preset(preset, find_hardware(mesh), config)
    if found.name != MULTIHEAD:
        return RingAttention(found, config, mesh=mesh, layer=layer, reason=reason)
    if config.embed_dim is None or config.num_heads is None:
        raise OptionError(
            f"embed_dim={config.embed_dim} and num_heads={config.num_heads}",
            at=f"preset {found.name}",
            because="its projections are as wide as the model",
            instead="both numbers",
        )
    return MultiheadRingAttention(
        config.embed_dim,
        config.num_heads,
        dropout=config.dropout,
        bias=config.bias,
        batch_first=True,
        attention=found.name,
        config=config,
        mesh=mesh,
        layer=layer,
    )
