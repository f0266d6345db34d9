"""What a row of the zoo is, and how rows of transformers models are built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

VOCABULARY = 131
LENGTH = 64
BATCH = 2
IMAGE = 32
IGNORED = -100

Inputs = dict[str, Any]
Attention = Literal["sdpa", "eager"]
BOTH: tuple[Attention, ...] = ("sdpa", "eager")
EAGER: tuple[Attention, ...] = ("eager",)


@dataclass(frozen=True, slots=True)
class ZooModel:
    """One architecture.

    Attributes:
        name: its name in tables.
        library: ``transformers``, ``timm`` or ``torch.nn``.
        build: the model, tiny and with random weights, for an implementation.
        make_inputs: the batch, the same at every call.
        attentions: implementations that it has.
        is_training: the mode it is run in.
        has_backward: else it is run under ``torch.no_grad``.
    """

    name: str
    library: str
    build: Callable[[Attention], nn.Module]
    make_inputs: Callable[[], Inputs]
    attentions: tuple[Attention, ...] = BOTH
    is_training: bool = True
    has_backward: bool = True


@dataclass(frozen=True, slots=True)
class Build:
    """Builds a transformers model from its config.

    Attributes:
        model: name of the model's class.
        config: name of its config's class.
        settings: of the config; values that are functions are called.
    """

    model: str
    config: str
    settings: Mapping[str, Any]

    def __call__(self, attention: Attention) -> nn.Module:
        import transformers  # noqa: PLC0415 - seconds to import

        config = getattr(transformers, self.config)(
            **{k: v() if callable(v) else v for k, v in self.settings.items()}
        )
        _remove_dropout(config)
        config._attn_implementation = attention
        model = getattr(transformers, self.model)(config)
        assert isinstance(model, nn.Module)
        if getattr(model, "loss_type", "") is None:
            # Unset, transformers logs that it takes this one; logging breaks the graph.
            setattr(model, "loss_type", "ForCausalLM")  # noqa: B010 - no declared field
        return model


def _remove_dropout(config: Any) -> None:  # noqa: ANN401 - any config
    """Set every kind of dropout to 0, in a config and in those inside of it."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif name.endswith("config") and hasattr(value, "to_dict"):
            _remove_dropout(value)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def tokens() -> Inputs:
    """Ids and labels, some of them ignored; no id is a special one."""
    ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=_seeded())
    labels = ids.clone()
    labels[0, : LENGTH // 4] = IGNORED
    labels[1, -3:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def padded() -> Inputs:
    """A batch whose second row ends early."""
    inputs = tokens()
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, -LENGTH // 3 :] = 0
    inputs["labels"][1, -LENGTH // 3 :] = IGNORED
    return inputs | {"attention_mask": mask}


def ids_only() -> Inputs:
    """Ids alone, for a model without a head."""
    return {"input_ids": tokens()["input_ids"]}


def two_sequences() -> Inputs:
    """A source, and the labels of a shorter target."""
    inputs = tokens()
    return inputs | {"labels": inputs["labels"][:, : LENGTH // 2].contiguous()}


def image() -> Tensor:
    return torch.randn(BATCH, 3, IMAGE, IMAGE, generator=_seeded())


def pixels() -> Inputs:
    """Images alone."""
    return {"pixel_values": image()}


def labelled_pixels() -> Inputs:
    """Images and a class for each."""
    return pixels() | {"labels": torch.tensor([1, 0])}
