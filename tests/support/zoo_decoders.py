"""Decoders of transformers."""

from typing import Any

from support.zoo_rows import BOTH, EAGER, VOCABULARY, Attention, Build, ZooModel, tokens

HEAD_DIM: dict[str, Any] = {"head_dim": 8}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW: dict[str, Any] = {"sliding_window": 24}
MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}


def decoder(
    name: str,
    kind: str,
    *,
    model: str = "",
    config: str = "",
    attentions: tuple[Attention, ...] = BOTH,
    **settings: Any,  # noqa: ANN401
) -> ZooModel:
    """A row of a causal language model with the usual names in its config."""
    usual: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    build = Build(
        model or f"{kind}ForCausalLM", config or f"{kind}Config", usual | settings
    )
    return ZooModel(name, "transformers", build, tokens, attentions)


LLAMAS = (
    decoder("llama", "Llama"),
    decoder("mistral", "Mistral", **WINDOW),
    decoder("qwen2", "Qwen2"),
    decoder("qwen3", "Qwen3", **HEAD_DIM),
    decoder("gemma", "Gemma", **HEAD_DIM),
    decoder("gemma2", "Gemma2", attentions=EAGER, **HEAD_DIM, **WINDOW),
    decoder(
        "gemma3",
        "Gemma3",
        config="Gemma3TextConfig",
        layer_types=["sliding_attention", "full_attention"],
        **HEAD_DIM,
        **WINDOW,
    ),
    decoder("phi", "Phi"),
    decoder("phi3", "Phi3"),
    decoder("starcoder2", "Starcoder2", sliding_window=None),
    decoder("olmo", "Olmo"),
    decoder("olmo2", "Olmo2"),
    decoder("olmo3", "Olmo3", **WINDOW),
    decoder("cohere", "Cohere"),
    decoder("cohere2", "Cohere2", head_dim=8, **WINDOW),
    decoder("granite", "Granite"),
    decoder("glm", "Glm", **HEAD_DIM),
    decoder("glm4", "Glm4", **HEAD_DIM),
    decoder("stablelm", "StableLm"),
    decoder("persimmon", "Persimmon"),
    decoder("nemotron", "Nemotron", **HEAD_DIM),
    decoder("smollm3", "SmolLM3"),
    decoder("ernie4_5", "Ernie4_5", **HEAD_DIM),
    decoder("exaone4", "Exaone4", **WINDOW),
    decoder("helium", "Helium", **HEAD_DIM),
    decoder("seed_oss", "SeedOss", **HEAD_DIM),
    decoder("arcee", "Arcee"),
    decoder("hunyuan_v1_dense", "HunYuanDenseV1", **HEAD_DIM),
    decoder("diffllama", "DiffLlama"),
    decoder("bitnet", "BitNet"),
    decoder("nanochat", "NanoChat"),
    decoder("ministral", "Ministral", **HEAD_DIM, **WINDOW),
)
EXPERT_MODELS = (
    decoder("mixtral", "Mixtral", sliding_window=None, **LOCAL_EXPERTS),
    decoder("qwen2_moe", "Qwen2Moe", shared_expert_intermediate_size=16, **EXPERTS),
    decoder("qwen3_moe", "Qwen3Moe", **HEAD_DIM, **EXPERTS),
    decoder("olmoe", "Olmoe", num_experts=4, num_experts_per_tok=2),
    decoder("granitemoe", "GraniteMoe", **LOCAL_EXPERTS),
    decoder(
        "gpt_oss", "GptOss", attentions=EAGER, **HEAD_DIM, **WINDOW, **LOCAL_EXPERTS
    ),
    decoder("deepseek_v2", "DeepseekV2", num_key_value_heads=4, **MLA),
    decoder("deepseek_v3", "DeepseekV3", num_key_value_heads=4, **MLA),
    decoder("minimax", "MiniMax", **HEAD_DIM, **LOCAL_EXPERTS, block_size=16),
    decoder(
        "jamba",
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    decoder("lfm2", "Lfm2", layer_types=["conv", "full_attention"]),
)
GPTS = (
    decoder(
        "gpt2",
        "GPT2",
        model="GPT2LMHeadModel",
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
    ),
    decoder("gpt_neox", "GPTNeoX"),
    decoder(
        "gpt_neo",
        "GPTNeo",
        attentions=EAGER,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=24,
    ),
    decoder(
        "gptj", "GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=256
    ),
    decoder(
        "codegen",
        "CodeGen",
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=256,
        n_ctx=256,
    ),
    decoder(
        "gpt_bigcode", "GPTBigCode", n_embd=32, n_layer=2, n_head=4, n_positions=256
    ),
    decoder("opt", "OPT", word_embed_proj_dim=32, ffn_dim=48),
    decoder("bloom", "Bloom", attentions=EAGER, n_layer=2, n_head=4),
    decoder("falcon", "Falcon", ffn_hidden_size=48),
    decoder("falcon alibi", "Falcon", ffn_hidden_size=48, alibi=True),
    decoder(
        "mpt",
        "Mpt",
        attentions=EAGER,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        expansion_ratio=2,
    ),
    decoder(
        "xglm",
        "XGLM",
        attentions=EAGER,
        d_model=32,
        ffn_dim=48,
        num_layers=2,
        attention_heads=4,
    ),
    decoder("biogpt", "BioGpt"),
    decoder("modernbert_decoder", "ModernBertDecoder", local_attention=24),
)
DECODERS = (*LLAMAS, *EXPERT_MODELS, *GPTS)
