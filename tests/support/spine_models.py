"""The models of the spine: unmodified Hugging Face models with random weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from support.tolerances import assert_no_worse_than_one_rank

VOCABULARY = 131
IGNORED = -100

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SpineModel:
    """How to build one row of the matrix.

    Attributes:
        name: its name in tables.
        build: the model for an attention implementation, ``sdpa`` or ``eager``, and a
            number of layers.
        make_inputs: a batch of the given sequence length.
        length: tokens, unless a test asks for another number.
        num_layers: each has one attention.
    """

    name: str
    build: Callable[[str, int], nn.Module]
    make_inputs: Callable[[int], Inputs]
    length: int = 96
    num_layers: int = 2


def _decoder(kind: str, **extra: Any) -> Callable[[str, int], nn.Module]:  # noqa: ANN401
    def build(attention: str, num_layers: int) -> nn.Module:
        import transformers  # noqa: PLC0415 - seconds to import

        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            **{"use_cache": False, **extra},
        )
        config._attn_implementation = attention
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        assert isinstance(model, nn.Module)
        return model

    return build


def _gpt2(attention: str, num_layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=num_layers,
        n_head=4,
        n_positions=1024,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = attention
    model = GPT2LMHeadModel(config)
    # Unset, transformers logs that it takes this one, and logging breaks the graph.
    model.loss_type = "ForCausalLM"
    assert isinstance(model, nn.Module)
    return model


def _bert(attention: str, num_layers: int) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM  # noqa: PLC0415

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = attention
    return BertForMaskedLM(config)


def tokens(length: int) -> Inputs:
    """Ids and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, VOCABULARY, (2, length), generator=generator)
    labels = ids.clone()
    labels[0, : length // 4] = IGNORED
    labels[1, -3:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _padded(length: int, *, left: bool) -> Inputs:
    inputs = tokens(length)
    mask = torch.ones(2, length, dtype=torch.int64)
    pads = slice(0, length // 3) if left else slice(length - length // 3, length)
    mask[1, pads] = 0
    inputs["labels"][1, pads] = IGNORED
    return inputs | {"attention_mask": mask}


def right_padded(length: int) -> Inputs:
    """A batch whose second row ends early."""
    return _padded(length, left=False)


def left_padded(length: int) -> Inputs:
    """A batch whose second row starts late."""
    return _padded(length, left=True)


def packed(length: int) -> Inputs:
    """Several documents in each row; positions start anew in each."""
    cuts = ((length // 3, length // 2), (length // 5, length - 7))
    rows = []
    for a, b in cuts:
        parts = (a, b - a, length - b)
        rows.append(torch.cat([torch.arange(n) for n in parts]))
    return tokens(length) | {"position_ids": torch.stack(rows)}


SPINE = (
    SpineModel("llama", _decoder("Llama"), tokens),
    SpineModel("mistral", _decoder("Mistral", sliding_window=128), tokens, length=512),
    SpineModel("qwen2", _decoder("Qwen2"), tokens),
    SpineModel("gpt2", _gpt2, tokens),
    SpineModel("bert padded", _bert, right_padded),
    SpineModel("llama packed", _decoder("Llama"), packed),
    SpineModel("llama left-padded", _decoder("Llama"), left_padded),
    SpineModel("llama cache", _decoder("Llama", use_cache=True), tokens),
)


def find_model(name: str, num_layers: int = 2) -> SpineModel:
    """The row of that name."""
    row = next(m for m in SPINE if m.name == name)
    return replace(row, num_layers=num_layers)


def build_model(row: SpineModel, attention: str, dtype: torch.dtype) -> nn.Module:
    """The model in training mode, the same weights at every call."""
    torch.manual_seed(0)
    return row.build(attention, row.num_layers).to(dtype).train()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one training step gives."""

    loss: Tensor
    logits: Tensor
    grads: dict[str, Tensor | None]


def run_step(model: nn.Module, call: Callable[..., Any], inputs: Inputs) -> Outcome:
    """Forward, loss and backward; ``call`` is ``model`` or what it compiled to."""
    out = call(**inputs)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return Outcome(out.loss.detach(), out.logits.detach(), grads)


def assert_step_no_worse_than_one_rank(
    got: Outcome, one_rank: Outcome, want64: Outcome
) -> None:
    """Low precision: logits and gradients within 2x of one rank's error.

    Gradients are taken together, since a single one of 32 numbers is a draw of rounding
    errors: by the largest error in the model, and by the root of the summed squares.
    """
    assert_no_worse_than_one_rank(got.logits, one_rank.logits, want64.logits, "logits")
    mine, theirs, want = (
        torch.cat([g.double().flatten() for g in o.grads.values() if g is not None])
        for o in (got, one_rank, want64)
    )
    assert_no_worse_than_one_rank(mine, theirs, want, "largest gradient error")
    mean, base = ((x - want).square().mean().sqrt() for x in (mine, theirs))
    assert mean <= 2 * base, f"gradients: mean error {mean:.3g} > 2 x {base:.3g}"


def run_reference(row: SpineModel, attention: str, inputs: Inputs) -> Outcome:
    """The same step in eager float64."""
    model = build_model(row, attention, torch.float64)
    with Float64():
        return run_step(model, model, inputs)


class Float64(TorchFunctionMode):
    """Gives float64 wherever a model asks for float32.

    transformers computes norms, softmax and loss in float32 "to be exact", which cuts
    float64 down, and turns masked scores (``finfo(float64).min``) to -inf: NaN in empty
    rows.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        if func is Tensor.to:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if getattr(func, "__name__", "") == "_grouped_mm":  # of F.grouped_mm
            return _multiply_groups(args[0], args[1], kwargs["offs"])
        return func(*args, **kwargs)


def _multiply_groups(rows: Tensor, weights: Tensor, ends_of_groups: Tensor) -> Tensor:
    """``grouped_mm``, which has no float64: each group of rows by its own matrix."""
    ends = ends_of_groups.tolist()
    starts = [0, *ends[:-1]]
    groups = zip(starts, ends, weights, strict=True)
    return torch.cat([rows[start:end] @ weight for start, end, weight in groups])
