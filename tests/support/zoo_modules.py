"""Models of timm, and modules of ``torch.nn``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.zoo_rows import BATCH, IMAGE, Attention, Inputs, ZooModel, image

S, T, E, H = 48, 32, 32, 4


def import_timm() -> Any:  # noqa: ANN401 - a module
    """timm, or an ImportError.

    timm imports torchvision, for transforms that no model needs. One whose C++ part
    doesn't fit this torch, such as a build for GPUs beside a torch for CPUs, fails for
    want of two operators that it gives shapes to; then we define these, for good.
    """
    try:
        import timm  # noqa: PLC0415 - optional
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + arguments)
        KEPT.append(library)  # one that is collected takes its operators along
        import timm  # noqa: PLC0415
    return timm


def is_installed(library: str) -> bool:
    """Whether rows of a library can be built."""
    if library != "timm":
        return True
    try:
        import_timm()
    except ImportError:
        return False
    return True


KEPT: list[torch.library.Library] = []


def vision(name: str, **settings: Any) -> ZooModel:  # noqa: ANN401
    """A row of a timm model."""

    def build(attention: Attention) -> nn.Module:
        usual = {"img_size": IMAGE, "num_classes": 10}
        model = import_timm().create_model(name, **(usual | settings))
        assert isinstance(model, nn.Module)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", attention == "sdpa")  # noqa: B010 - no declared field
        return model

    return ZooModel(f"timm {name}", "timm", build, lambda: {"x": image()})


PLAIN: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 4}
TIMM = (
    vision("vit_tiny_patch16_224", **PLAIN),
    vision("deit_tiny_distilled_patch16_224", **PLAIN),
    vision("deit3_small_patch16_224", **PLAIN),
    vision("vit_small_patch14_reg4_dinov2", **PLAIN),
    vision("vit_base_patch16_siglip_224", **PLAIN),
    vision("beit_base_patch16_224", **PLAIN),
    vision("eva02_tiny_patch14_224", **PLAIN),
    vision("cait_xxs24_224", **PLAIN),
    vision("xcit_nano_12_p8_224", embed_dim=32, depth=2, num_heads=4),
    vision(
        "swin_tiny_patch4_window7_224",
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        patch_size=2,
        window_size=4,
    ),
)


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_()


def _keep(length: int) -> Tensor:
    """Padding as ``nn`` takes it: true where a key is left out."""
    out = torch.zeros(BATCH, length, dtype=torch.bool)
    out[1, -length // 3 :] = True
    return out


def _source() -> Inputs:
    return {"src": _random(BATCH, S, E, seed=1)}


def _padded_source() -> Inputs:
    return _source() | {"src_key_padding_mask": _keep(S)}


def _causal_source() -> Inputs:
    mask = nn.Transformer.generate_square_subsequent_mask(S)
    return _source() | {"mask": mask, "is_causal": True}


def _target() -> Inputs:
    return {
        "tgt": _random(BATCH, T, E, seed=2),
        "memory": _random(BATCH, S, E, seed=1),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(T),
        "tgt_is_causal": True,
    }


def _both() -> Inputs:
    return {
        "src": _random(BATCH, S, E, seed=1),
        "tgt": _random(BATCH, T, E, seed=2),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(T),
        "tgt_is_causal": True,
    }


def _self_attention(*, need_weights: bool) -> Callable[[], Inputs]:
    def make() -> Inputs:
        x = _random(BATCH, S, E, seed=1)
        return {"query": x, "key": x, "value": x, "need_weights": need_weights}

    return make


def _encoder(*, norm_first: bool = False) -> Callable[[Attention], nn.Module]:
    def build(_: Attention) -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            E, H, 48, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return build


def _decoder(_: Attention) -> nn.Module:
    layer = nn.TransformerDecoderLayer(E, H, 48, dropout=0.0, batch_first=True)
    return nn.TransformerDecoder(layer, 2)


def _transformer(_: Attention) -> nn.Module:
    return nn.Transformer(E, H, 2, 2, 48, dropout=0.0, batch_first=True)


def _multihead(_: Attention) -> nn.Module:
    return nn.MultiheadAttention(E, H, batch_first=True)


def module(
    name: str,
    build: Callable[[Attention], nn.Module],
    make_inputs: Callable[[], Inputs],
    **mode: bool,
) -> ZooModel:
    """A row of ``torch.nn``; those choose their implementation themselves."""
    return ZooModel(f"nn.{name}", "torch.nn", build, make_inputs, ("sdpa",), **mode)


MODULES = (
    module("TransformerEncoder", _encoder(), _padded_source),
    module("TransformerEncoder causal", _encoder(norm_first=True), _causal_source),
    module("TransformerEncoder eval", _encoder(), _source, is_training=False),
    module(
        "TransformerEncoder without gradients",
        _encoder(),
        _padded_source,
        is_training=False,
        has_backward=False,
    ),
    module("TransformerDecoder", _decoder, _target),
    module("Transformer", _transformer, _both),
    module("MultiheadAttention", _multihead, _self_attention(need_weights=False)),
    module(
        "MultiheadAttention with weights",
        _multihead,
        _self_attention(need_weights=True),
    ),
)
