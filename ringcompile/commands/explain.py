"""``explain``: what the backend does to a small model of a well-known kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ringcompile.commands.extras import check_transformers
from ringcompile.report.explain import explain
from ringcompile.report.report import Report

VOCABULARY = 512


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a model, small enough that it takes seconds.

    Attributes:
        layers: of the model.
        length: tokens S.
        hidden: its width.
        heads: query heads H.
    """

    layers: int = 2
    length: int = 512
    hidden: int = 64
    heads: int = 4


def _build_llama(size: ModelSize) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - seconds

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 2),
        max_position_embeddings=size.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _build_mistral(size: ModelSize) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM  # noqa: PLC0415

    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 2),
        max_position_embeddings=size.length,
        sliding_window=size.length // 4,
        use_cache=False,
    )
    return MistralForCausalLM(config)


def _build_gpt2(size: ModelSize) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=size.hidden,
        n_layer=size.layers,
        n_head=size.heads,
        n_positions=size.length,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def _build_bert(size: ModelSize) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM  # noqa: PLC0415

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


MODELS: Mapping[str, Callable[[ModelSize], nn.Module]] = {
    "bert": _build_bert,
    "gpt2": _build_gpt2,
    "llama": _build_llama,
    "mistral": _build_mistral,
}


def explain_model(
    name: str, size: ModelSize, *, world_size: int, options: Mapping[str, object]
) -> Report:
    """Explain a model with random weights and labels.

    Args:
        name: one of ``MODELS``.
        size: its sizes.
        world_size: the number of ranks.
        options: options of the backend.

    Raises:
        RingCompileError: transformers is missing.
    """
    check_transformers("explain --model")
    torch.manual_seed(0)
    model = MODELS[name](size)
    ids = torch.randint(VOCABULARY, (1, size.length))
    inputs: dict[str, Tensor] = {"input_ids": ids, "labels": ids}
    if name == "bert":
        inputs["attention_mask"] = (torch.arange(size.length) < size.length - 8).long()[
            None
        ]
    return explain(model, world_size=world_size, options=options, **inputs)
