"""Encoders and encoder-decoders of transformers, for text and sound."""

from collections.abc import Callable
from typing import Any

import torch

from support.zoo_rows import (
    BATCH,
    BOTH,
    EAGER,
    LENGTH,
    VOCABULARY,
    Attention,
    Build,
    Inputs,
    ZooModel,
    ids_only,
    padded,
    two_sequences,
)


def encoder(
    name: str,
    kind: str,
    *,
    model: str = "",
    make_inputs: Callable[[], Inputs] = padded,
    attentions: tuple[Attention, ...] = BOTH,
    **settings: Any,  # noqa: ANN401
) -> ZooModel:
    """A row of a masked language model with the usual names in its config."""
    usual: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 1,
    }
    build = Build(model or f"{kind}ForMaskedLM", f"{kind}Config", usual | settings)
    return ZooModel(name, "transformers", build, make_inputs, attentions)


def two_stacks(
    name: str,
    kind: str,
    *,
    model: str = "",
    make_inputs: Callable[[], Inputs] = two_sequences,
    attentions: tuple[Attention, ...] = BOTH,
    **settings: Any,  # noqa: ANN401
) -> ZooModel:
    """A row of an encoder-decoder in the manner of BART."""
    usual: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 256,
        "use_cache": False,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    build = Build(
        model or f"{kind}ForConditionalGeneration", f"{kind}Config", usual | settings
    )
    return ZooModel(name, "transformers", build, make_inputs, attentions)


def sound_wave() -> Inputs:
    """A waveform of 64 frames after the front end, and a transcript of each."""
    generator = torch.Generator().manual_seed(3)
    wave = torch.randn(BATCH, 5 * LENGTH, generator=generator)
    return {"input_values": wave}


def spectrogram() -> Inputs:
    """Frames of mels, and the labels of a transcript."""
    generator = torch.Generator().manual_seed(3)
    mels = torch.randn(BATCH, 8, 2 * LENGTH, generator=generator)
    return {"input_features": mels, "labels": two_sequences()["labels"]}


def boxes() -> Inputs:
    """Tokens and where each lies on a page."""
    generator = torch.Generator().manual_seed(4)
    corners = torch.randint(0, 50, (BATCH, LENGTH, 2), generator=generator)
    return padded() | {"bbox": torch.cat([corners, corners + 40], -1)}


T5: dict[str, Any] = {
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
XLNET = Build(
    "XLNetModel",
    "XLNetConfig",
    {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 48,
    },
)
ENCODERS = (
    encoder("bert", "Bert"),
    encoder("roberta", "Roberta"),
    encoder("distilbert", "DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    encoder("albert", "Albert", embedding_size=16),
    encoder("electra", "Electra", embedding_size=16),
    encoder(
        "deberta_v2",
        "DebertaV2",
        attentions=EAGER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    ),
    encoder("mpnet", "MPNet", attentions=EAGER),
    encoder("modernbert", "ModernBert", local_attention=24),
    encoder("esm", "Esm", position_embedding_type="rotary", mask_token_id=3),
    encoder("longformer", "Longformer", attentions=EAGER, attention_window=16),
    encoder("camembert", "Camembert"),
    encoder("xlm_roberta", "XLMRoberta"),
    encoder(
        "mobilebert",
        "MobileBert",
        embedding_size=16,
        true_hidden_size=16,
        intra_bottleneck_size=16,
    ),
    encoder("squeezebert", "SqueezeBert", attentions=EAGER, embedding_size=32),
    encoder("layoutlm", "LayoutLM", make_inputs=boxes),
    encoder("data2vec_text", "Data2VecText"),
    encoder("roformer", "RoFormer", attentions=EAGER, embedding_size=32),
    encoder(
        "rembert",
        "RemBert",
        attentions=EAGER,
        input_embedding_size=16,
        output_embedding_size=16,
    ),
    encoder("megatron_bert", "MegatronBert", attentions=EAGER),
    encoder("ernie", "Ernie"),
    encoder("eurobert", "EuroBert"),
    encoder("nomic_bert", "NomicBert"),
    encoder("big_bird", "BigBird", attentions=EAGER, attention_type="original_full"),
    encoder("convbert", "ConvBert", attentions=EAGER, embedding_size=32),
    encoder("fnet", "FNet", attentions=EAGER),
    ZooModel("xlnet", "transformers", XLNET, ids_only, EAGER),
)
SEQUENCES = (
    two_stacks("t5", "T5", **T5),
    two_stacks("t5 gated", "T5", feed_forward_proj="gated-gelu", **T5),
    two_stacks("mt5", "MT5", **T5),
    two_stacks("umt5", "UMT5", **T5),
    two_stacks(
        "switch_transformers",
        "SwitchTransformers",
        attentions=EAGER,
        num_experts=4,
        **T5,
    ),
    two_stacks("bart", "Bart"),
    two_stacks("mbart", "MBart"),
    two_stacks("pegasus", "Pegasus"),
    two_stacks("marian", "Marian", model="MarianMTModel"),
    two_stacks("blenderbot", "Blenderbot"),
    two_stacks("m2m_100", "M2M100"),
    two_stacks("plbart", "PLBart"),
    two_stacks(
        "whisper",
        "Whisper",
        make_inputs=spectrogram,
        num_mel_bins=8,
        max_source_positions=LENGTH,
        max_target_positions=LENGTH,
    ),
)
WAVE: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 1),
    "conv_kernel": (5, 1),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "make_inputs": sound_wave,
}
SOUNDS = (
    encoder("wav2vec2", "Wav2Vec2", model="Wav2Vec2Model", **WAVE),
    encoder("hubert", "Hubert", model="HubertModel", **WAVE),
    encoder("wavlm", "WavLM", attentions=EAGER, model="WavLMModel", **WAVE),
    encoder("unispeech", "UniSpeech", model="UniSpeechModel", **WAVE),
)
