"""Transformers models that see, and one that sees and reads."""

from collections.abc import Callable
from typing import Any

import torch

from support.zoo_rows import (
    BATCH,
    BOTH,
    EAGER,
    IMAGE,
    LENGTH,
    VOCABULARY,
    Attention,
    Build,
    Inputs,
    ZooModel,
    image,
    labelled_pixels,
    padded,
    pixels,
    tokens,
)

USUAL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE_TOKEN = 3
NUM_IMAGE_TOKENS = 16


def sight(
    name: str,
    kind: str,
    *,
    model: str = "",
    make_inputs: Callable[[], Inputs] = labelled_pixels,
    attentions: tuple[Attention, ...] = BOTH,
    **settings: Any,  # noqa: ANN401
) -> ZooModel:
    """A row of a vision transformer with the usual names in its config."""
    build = Build(
        model or f"{kind}ForImageClassification", f"{kind}Config", USUAL | settings
    )
    return ZooModel(name, "transformers", build, make_inputs, attentions)


def video() -> Inputs:
    """A clip of four frames."""
    generator = torch.Generator().manual_seed(5)
    shape = (BATCH, 4, 3, IMAGE // 2, IMAGE // 2)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def text_and_image() -> Inputs:
    """A caption of each image."""
    text = padded()
    text.pop("labels")
    text["input_ids"][:, -1] = 2  # CLIP pools where the end is
    return text | pixels()


def image_in_text() -> Inputs:
    """Tokens, some of which stand for the patches of an image."""
    inputs = tokens()
    inputs["input_ids"][:, 4 : 4 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN
    inputs["labels"][:, 4 : 4 + NUM_IMAGE_TOKENS] = -100
    pixels_of_half = image()[..., : IMAGE // 2, : IMAGE // 2]
    return inputs | {"pixel_values": pixels_of_half.contiguous()}


def mels() -> Inputs:
    """A spectrogram, as an image that lies on its side."""
    generator = torch.Generator().manual_seed(6)
    frames = torch.randn(BATCH, LENGTH, 16, generator=generator)
    return {"input_values": frames, "labels": torch.tensor([1, 0])}


def _llava(vision: str) -> Build:
    def see() -> object:
        import transformers  # noqa: PLC0415 - seconds to import

        sizes = USUAL | {"image_size": IMAGE // 2}
        return getattr(transformers, vision)(**sizes)

    def read() -> object:
        from transformers import LlamaConfig  # noqa: PLC0415

        return LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False)

    settings = {
        "vision_config": see,
        "text_config": read,
        "image_token_id": IMAGE_TOKEN,
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
    }
    return Build("LlavaForConditionalGeneration", "LlavaConfig", settings)


def _swin(kind: str) -> Build:
    settings = {
        "image_size": IMAGE,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    return Build(f"{kind}ForImageClassification", f"{kind}Config", settings)


PAIR: dict[str, Any] = {"text_config": TEXT, "vision_config": USUAL}
CLIP: dict[str, Any] = {"projection_dim": 16}
VIDEO: dict[str, Any] = {
    "image_size": IMAGE // 2,
    "num_frames": 4,
    "make_inputs": video,
}
VISION = (
    sight("vit", "ViT"),
    sight("deit", "DeiT"),
    sight("dinov2", "Dinov2"),
    sight("dinov2_with_registers", "Dinov2WithRegisters"),
    sight(
        "dinov3_vit",
        "DINOv3ViT",
        model="DINOv3ViTModel",
        make_inputs=pixels,
        pos_embed_rescale=None,  # drawn at random in training
    ),
    sight("beit", "Beit"),
    sight("beit relative", "Beit", use_relative_position_bias=True),
    sight("data2vec_vision", "Data2VecVision", use_relative_position_bias=True),
    sight("ijepa", "IJepa"),
    ZooModel("swin", "transformers", _swin("Swin"), labelled_pixels),
    ZooModel("swinv2", "transformers", _swin("Swinv2"), labelled_pixels, EAGER),
    sight(
        "yolos",
        "Yolos",
        model="YolosModel",
        make_inputs=pixels,
        image_size=[IMAGE, IMAGE],
    ),
    sight(
        "clip", "CLIP", model="CLIPModel", make_inputs=text_and_image, **PAIR, **CLIP
    ),
    sight("siglip", "Siglip", model="SiglipModel", make_inputs=text_and_image, **PAIR),
    sight("clip_vision", "CLIPVision", model="CLIPVisionModel", make_inputs=pixels),
    sight("videomae", "VideoMAE", model="VideoMAEModel", **VIDEO),
    sight("vivit", "Vivit", model="VivitModel", tubelet_size=[2, 4, 4], **VIDEO),
    sight(
        "audio_spectrogram_transformer",
        "AST",
        model="ASTForAudioClassification",
        make_inputs=mels,
        max_length=LENGTH,
        num_mel_bins=16,
        frequency_stride=4,
        time_stride=4,
    ),
    ZooModel("llava", "transformers", _llava("CLIPVisionConfig"), image_in_text),
)
